"""Addresses and numbers that are nobody's: reserved for examples, documents, tests and films.

Who writes documentation uses them on purpose, so they are no personal data.
"""

from __future__ import annotations

import re

__all__ = ["is_reserved"]

# RFC 2606 and RFC 6761.
_MAIL = re.compile(
    r"@(?:[\w-]+\.)*(?:example(?:\.(?:com|net|org))?|test|invalid|localhost)$", re.IGNORECASE)

# Digits after a country's code, or after the 0 in its place.
_PHONES = {
    # North American Numbering Plan: 555-0100 to 555-0199 of each area.
    "1": r"\d{3}55501\d\d",
    # Ofcom, telephone numbers for use in TV and radio drama programmes.
    "44": r"(?:1(?:1[3-8]|[2-6]1)4960|1914980|2079460|2896496|2920180|1632960|7700900|8081570"
          r"|9098790|3069990)\d{3}",
    # Arcep, numbers for audiovisual works.
    "33": r"(?:19900|26191|35301|46571|53649|63998)\d{4}",
    # Bundesnetzagentur, numbers for media productions.
    "49": r"(?:3023125|4066969|6990009|8999998|2214710)\d{3}",
    # ACMA, phone numbers for use in creative works.
    "61": r"[2378](?:5550|7010)\d{4}|491570(?:006|110|15[6-9])",
}
_NUMBERS = {
    "4000056655665556", "4012888888881881", "4111111111111111", "4222222222222",
    "4242424242424242", "5105105105105100", "5555555555554444", "2223003122003222",
    "378282246310005", "371449635398431", "6011000990139424", "6011111111111117",
    "30569309025904", "3056930009020004", "3530111333300000", "3566002020360505",
    "at611904300234573201", "be68539007547034", "ch9300762011623852957", "de89370400440532013000",
    "es9121000418450200051332", "fr1420041010050500013m02606", "gb29nwbk60161331926819",
    "gb82west12345698765432", "it60x0542811101000000123456", "nl91abna0417164300",
}
"""Cards that payment services publish for tests, and the examples of the IBAN registry."""


def is_reserved(kind: str, value: str) -> bool:
    """Tell whether a value of a kind of `cloister.audit.notebook.personal` is for examples."""
    if kind == "email":
        return _MAIL.search(value) is not None
    if kind != "phone":
        return re.sub(r"\W", "", value.lower()) in _NUMBERS
    digits = re.sub(r"\D", "", value)
    forms = [(code, digits.removeprefix(code)) for code in _PHONES if digits.startswith(code)]
    forms += [(code, digits[1:]) for code in _PHONES if code != "1" and digits.startswith("0")]
    return any(re.fullmatch(_PHONES[code], rest) for code, rest in (*forms, ("1", digits)))
