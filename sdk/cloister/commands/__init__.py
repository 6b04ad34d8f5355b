"""What each command does. Each takes parsed arguments, shows people a result unless `--json` is
given, and gives the record that `--json` prints."""

from cloister.commands.demo import demo
from cloister.commands.make import export, import_, quantize
from cloister.commands.measure import bench, eval_, tiers, verify
from cloister.commands.teach import distill
from cloister.commands.use import chat, compare, replay, run
from cloister.commands.vault import vault

__all__ = [
    "bench", "chat", "compare", "demo", "distill", "eval_", "export", "import_", "quantize",
    "replay", "run", "tiers", "vault", "verify",
]
