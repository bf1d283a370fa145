"""Why something is refused, in few words that stay the same from run to run."""

from __future__ import annotations

import re
import textwrap

# What dicer says -> in few words; the first that is found counts.
_WORDS = (
    (r"saved and loaded uncut", "saved and loaded uncut it is another model"),
    (r"something goes by the layer's number", "something goes by the layer's number"),
    (r"differs from the one in which they are zero", "cut is not masked"),
    (r"a layer does nothing", "a layer does nothing in text alone"),
    (r"its units do nothing", "its units do nothing"),
    (r"change nothing, so no comparison", "units cannot be told apart"),
    (r"has other tensors there", "a small twin has other tensors"),
    (r"same number in every layer, and of one width", "one number and one width for all layers"),
    (
        r"written, as it could not be opened again: no list of decoder layers",
        "in the pruned folder no layers are found",
    ),
    (r"no list of decoder layers", "no list of decoder layers"),
    (r"others that are none \(zero or skip", "its router has rows for more than its experts (zero or skip experts)"),
    (r"is a table of whole numbers", "a table of whole numbers gives tokens their experts"),
    (r"do not lie side by side", "its experts do not lie in gate_up_proj and down_proj"),
    (r"has no language model for a '(\w+)'", "saved, it is a type that has no language model"),
    (r"can be built with the widths that are left", "no class of transformers takes the config that is left"),
)


def few_words(why: str) -> str:
    """A reason without what may differ from run to run."""
    for pattern, words in _WORDS:
        if re.search(pattern, why):
            return words
    inner = re.search(r"cannot be built \((.*)\)$", why)
    said = re.sub(r"/\S+", "", inner[1] if inner else why).removeprefix("PlanError: ").split(". ")[0]
    said = re.sub(r"(?<![A-Za-z_\d])\d+(?:[x.]\d+)*(?:e[-+]?\d+)?", "#", said).split("; choose")[0]
    return ("cannot be built: " if inner else "") + textwrap.shorten(said, 130, placeholder=" ...")
