"""Whatever JSON stands in a bundle, it is used as the format says or refused by name."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.bundle import Bundle
from cloister.errors import BundleError
from cloister.manifest import FileEntry, Manifest

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from(["\ud800", "../x", "1.4.1", "program.xnnpack.pte", 2**63, -1, "x" * 2000])
)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    keys: Any = node if isinstance(node, dict) else range(len(node))
    found = [(node, key) for key in keys]
    for key in keys:
        if isinstance(node[key], dict | list):
            found += places(node[key])
    return found


@given(data=st.data())
@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_in_a_manifest_is_used_or_refused(
    bundle: Bundle, data: st.DataObject
) -> None:
    record = json.loads(bundle.manifest.to_json())
    container, key = data.draw(st.sampled_from(places(record)))
    container[key] = data.draw(_JSON)
    try:
        manifest = Manifest.from_json(json.dumps(record).encode())
        Bundle(bundle.path, manifest).program(lambda backend: True)
    except BundleError as error:
        str(error).encode()  # can be shown
        return
    assert Manifest.from_json(manifest.to_json().encode()) == manifest
    "".join((manifest.name, manifest.recipe, manifest.executorch)).encode()
    assert 1 <= manifest.prefill_chunk <= manifest.context


@given(raw=st.binary() | st.lists(_JSON, max_size=3).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()
))
@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_golden_file_is_used_or_refused(bundle: Bundle, raw: bytes) -> None:
    (bundle.path / "golden.jsonl").write_bytes(raw)
    entry = FileEntry(sha256=hashlib.sha256(raw).hexdigest(), size=len(raw))
    files = {**bundle.manifest.files, "golden.jsonl": entry}
    record = json.loads(bundle.manifest.to_json())
    record["files"] = {
        name: {"sha256": file.sha256, "size": file.size} for name, file in files.items()}
    (bundle.path / "manifest.json").write_text(json.dumps(record))
    opened = Bundle.open(bundle.path)
    try:
        rows = opened.golden()
    except BundleError:
        return
    assert all(0 <= id_ < 300 for row in rows for id_ in (*row.prompt, *row.tokens))
