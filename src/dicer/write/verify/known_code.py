"""Is the model file of a checkpoint one that dicer wrote? Then it may run, as whoever asks for a check trusts dicer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dicer.errors import ModelError
from dicer.reading import read_bytes
from dicer.write.config import MODELING_FILE

NOW = Path(__file__).parents[1] / "export" / MODELING_FILE
# sha256 of every modeling_pruned.py that a dicer wrote -> which dicer that was. Older checkpoints have older files.
KNOWN: Mapping[str, str] = MappingProxyType(
    {
        "419b34b39422770ceb7ef3b673ede57b4a246552d91717205c4e937bd5c8d6b2": "0.1.0, its first",
        "88751b494182cc745028bbcd955d43af0cd2d2266d1acd9ca51cd14e062f976d": "0.1.0, with heads and biases",
        "bb30ea3ca45467fbb30f79c19ee8b37bc010d003b85ff604d22a2d6fc11ba06c": "0.1.0, before vLLM",
        "57b95b4281c64d8977e3ceba24a5595479d3f81863508294704fa6420e7e3afa": "0.1.0, the first for vLLM",
        "abac6eafb2354098edf989aaf19635ec5bc5bcc1960b4993159b0a734f623bb3": "0.1.0, without unused norms",
        "68a7d94b689eaed1cadbc7c14e4d2a06cbc18f584313d7feafbfa020ea56d48c": "0.1.0, of ten families",
        "7a944180e94724c26c4545c094fba0ab74fe01b725bf0aa7c672dfd16daaefc5": "0.1.0, the last with a table of families",
        "d4cfade5d56b4a8ae7e2fa33845d90acf5e2da8243880a640052201f17004023": "0.1.0, before heads of layers",
        "66715a9ab5579d0a91882a6c121efe00d16710acb0d4a6fcff8e4c7a5661bd0a": "0.1.0",
    }
)


def written_by(folder: Path) -> str | None:
    """Which dicer wrote the code in a folder; None where it has none, or today's.

    Raises:
        ModelError: it is of another hand, and is not run.
    """
    code = folder / MODELING_FILE
    if not code.is_file() or (found := read_bytes(code)) == read_bytes(NOW):
        return None
    version = KNOWN.get(hashlib.sha256(found).hexdigest())
    if version is None:
        raise ModelError(
            f"{folder}: its {MODELING_FILE} is none that dicer wrote, so it is not run. Write the checkpoint anew with "
            "'dicer apply', or look at the file and load it with the flag yourself."
        )
    return version
