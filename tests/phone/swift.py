"""Whether a text is Swift, by tree-sitter's grammar: parsed, which is less than compiled."""

from __future__ import annotations

import tree_sitter
import tree_sitter_swift


def faults(source: str) -> list[int]:
    """Lines of `source` at which it is no Swift."""
    language = tree_sitter.Language(tree_sitter_swift.language())
    found, left = [], [tree_sitter.Parser(language).parse(source.encode()).root_node]
    while left:
        node = left.pop()
        if node.is_error or node.is_missing:
            found.append(node.start_point[0] + 1)
        left += node.children
    return found
