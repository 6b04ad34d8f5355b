"""Decode pictures and recordings, which may come from anyone, away from everything private.

Each file is decoded by a process of its own, started for it and ended after it:

1. It is executed afresh, with an empty environment and no open file but a pipe in, a pipe out and
   `/dev/null`; it holds no key, prompt, path or earlier file. It imports the libraries that the
   kind of file needs and nothing else of a user's machine.
2. Before it is given a byte of the file it gives up, for good, what it does not need
   (`confinement`): on Linux a system call filter leaves it 21 calls, with which it can compute,
   allocate, read and write the two pipes; it cannot open a file, make a socket, a process or a
   thread, or signal anybody. Elsewhere, and where the system takes no filter, limits of resources
   alone hold: no further descriptor (so no file, socket or pipe), no byte written to a file, and,
   unless the user is root, no further process.
3. It reads the header first. A picture with too many pixels, an animation, and a recording that is
   too long are refused before they are decoded (`Limits`). Memory is bounded by the system, on
   Linux; time by the process that asked, which kills it.
4. It answers with numbers: a code, two counts, and the pixels or samples. The one that asked checks
   that these are as many as the format says, and writes every sentence of an error itself. Nothing
   else comes back: no EXIF, GPS position, XMP, colour profile, comment, ID3 or Vorbis tag; its
   standard error goes nowhere, and neither process writes a file.

Samples in memory, as of a microphone, are no file: they are mixed and converted without a process,
which would take longer than to hear them.

What is read: PNG, JPEG and WebP (`pictures`), WAV, FLAC, Ogg and MP3 (`recordings`), told by their
content and never by a name. Pixels and samples themselves are not altered beyond what those modules
say: a face, a voice, or a text in a picture goes to the model.

Not covered: a decoder that is broken into may give wrong pixels, and take its limits of memory and
time. It cannot reach anything.
"""

from cloister.media.limits import Limits
from cloister.media.reader import read

__all__ = ["Limits", "read"]
