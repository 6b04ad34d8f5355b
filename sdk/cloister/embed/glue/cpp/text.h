// Text in UTF-8: white space at its ends, and characters in pieces.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace cloister {

// What Python and Jinja take for white space.
inline constexpr std::string_view kSpaces[] = {
    " ", "\t", "\n", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x1f", "\u00a0",
    "\xc2\x85", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
    "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};

inline std::string_view stripped(std::string_view text) {
  for (bool again = true; again;) {
    again = false;
    for (const std::string_view space : kSpaces) {
      const std::size_t size = space.size();
      if (text.size() < size) continue;
      if (text.substr(0, size) == space) {
        text.remove_prefix(size), again = true;
      } else if (text.substr(text.size() - size) == space) {
        text.remove_suffix(size), again = true;
      }
    }
  }
  return text;
}

// Takes the whole characters off `bytes`, U+FFFD for what is none; the start of one stays.
inline std::string characters(std::string& bytes) {
  std::string text;
  std::size_t at = 0;
  while (at < bytes.size()) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[at + i]); };
    const unsigned char lead = byte(0);
    const std::size_t size = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3
                             : lead < 0xF5 ? 4 : 0;
    const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    std::size_t count = 1;
    while (count < size && at + count < bytes.size() && byte(count) >= (count == 1 ? low : 0x80) &&
           byte(count) <= (count == 1 ? high : 0xBF)) {
      ++count;
    }
    if (count < size && at + count == bytes.size()) break;
    text += count == size ? bytes.substr(at, count) : "\xEF\xBF\xBD";
    at += count;
  }
  bytes.erase(0, at);
  return text;
}

}  // namespace cloister
