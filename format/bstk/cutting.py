"""Cut a file to a shorter prefix, and grow a cut from a larger file of the same model."""

from __future__ import annotations

import os

from .atomic import LockedFile, remove_leftovers
from .budget import Budget, Cut, budget_of, mb_ceil, mb_text
from .errors import DamagedError, RemoteChangedError, UsageError, os_errors
from .http import is_url
from .reader import Reader, is_remote, open, reopen, require_rewritable
from .transfer import Progress, download, extend, intact, overwrite_preamble, remove_parts, write_cut


def truncate(
    src: str | os.PathLike[str] | Reader,
    dst: str | os.PathLike[str] | None,
    mb: Budget | None = None,
    seal: bool = True,
    progress: Progress | None = None,
    overwrite: bool = True,
    *,
    budget: int | None = None,
) -> Cut:
    """Cut a file to at most `mb` megabytes (2**20 bytes), both as a file and as weights in memory.

    The bytes of the chunks are those of `src`; only the seal and the CRC in the preamble differ. Each chunk is checked
    against its digest while it is copied. Memory stays small however large the file is.

    Of a URL only the cut is fetched. Bytes that have arrived are kept in ``DST.part``, where the same call continues; any
    other call that succeeds with `dst` deletes it.

    Parameters
    ----------
    src : path, URL or Reader
        The file to cut: whole, sealed or partial. A reader is left open.
    dst : path or None
        The output, which replaces what is there when all of it is written. None cuts `src` in place; at every step of that
        the file on disk is valid, so a crash leaves it whole, partial or sealed, never broken. Cutting in place reads and
        checks only the header.
    mb, budget : number or str, int
        The budget: megabytes, or bytes instead. For a URL it may exceed the file: then all of it is fetched, unchanged.
    seal : bool
        Write the length into the preamble, which marks the cut as intended. Without it the seal is 0, and an unsealed `src`
        gives exactly its first bytes.
    progress : callable or None
        Called with the number of bytes of each piece copied; never when cutting in place, which copies nothing.
    overwrite : bool
        Replace what is at `dst`. Without it an existing `dst` is refused at the start, and again at the end.

    Returns
    -------
    Cut
        The part that was kept.

    Raises
    ------
    UsageError
        `mb` is not a positive number, or so large that nothing is cut; or `dst` is `src`, None for a URL, or exists; or
        another process changes the file in place, or fetches to the same `dst`.
    BudgetError
        The base model does not fit.
    NotBstkError, DamagedError, UnsupportedVersionError
        `src` is not a valid file, a chunk of the cut is damaged, or this package can read the file but not rewrite it.
    RemoteError, ResourceError, OutputError
        The URL cannot be read, or the result cannot be written; nothing was changed.
    """
    budget = budget_of(mb, budget)
    if isinstance(src, Reader):
        return _truncate(src, dst, budget, seal, progress, overwrite)
    if dst is None and not is_url(src):
        return _cut_in_place(os.fspath(src), budget, seal)
    with open(src, warn=False) as source:  # cutting repairs what the warning is about
        return _truncate(source, dst, budget, seal, progress, overwrite)


def plan(source: Reader, *, budget: int) -> Cut:
    """Return what `truncate` would keep of an open file within `budget` bytes, or raise its errors."""
    require_rewritable(source)
    cut = source.fit(budget=budget)
    # A partial file that fits is cut to the end of its last whole chunk and sealed, and a file on a server is fetched.
    if cut.chunks == len(source.chunks) and source.state != "partial" and not is_remote(source):
        raise UsageError(
            f"{source.source.name}: nothing to cut: all of it fits in {mb_ceil(cut.budget)} MB, and the budget is "
            f"{mb_text(budget)} MB.",
            hint="Give a smaller budget, or use the file as it is.",
        )
    return cut


def _truncate(
    source: Reader,
    dst: str | os.PathLike[str] | None,
    budget: int,
    seal: bool,
    progress: Progress | None,
    overwrite: bool,
) -> Cut:
    name = source.source.name
    if dst is None:
        raise UsageError(f"{name}: an open file or one on a server is not cut in place.", hint="Name an output.")
    if is_remote(source):
        try:
            return _fetch(source, dst, budget, seal, progress, overwrite)
        except RemoteChangedError:
            return _fetch(reopen(source), dst, budget, seal, progress, overwrite)
    cut = plan(source, budget=budget)
    if os.path.exists(dst) and os.path.exists(name) and os.path.samefile(name, dst):
        raise UsageError(f"{os.fspath(dst)}: the output is the input.", hint="To cut it in place, give no output.")
    write_cut(source, cut, dst, cut.file_bytes if seal else 0, progress, overwrite)
    return cut


def _fetch(
    source: Reader, dst: str | os.PathLike[str], budget: int, seal: bool, progress: Progress | None, overwrite: bool
) -> Cut:
    cut = plan(source, budget=budget)
    everything = cut.chunks == len(source.chunks) and source.state != "partial"
    length = source.seal if everything else cut.file_bytes
    download(source, cut, dst, length if seal else 0, progress, overwrite)
    return cut


def _cut_in_place(path: str, budget: int, seal: bool) -> Cut:
    """Unseal, shorten, seal, each on disk before the next begins: unsealed, the file is valid at either length."""
    open(path, warn=False).close()  # an invalid file is refused as such, even if it is not writable
    with LockedFile(path) as file:
        # Read again, because another process may have changed it before it was locked.
        source = open(file, warn=False)
        cut = plan(source, budget=budget)
        if source.seal:
            overwrite_preamble(file, source.preamble.sealed(0).to_bytes())
        with os_errors(path):
            file.shorten(cut.file_bytes)
            file.sync()
        if seal:
            overwrite_preamble(file, source.preamble.sealed(cut.file_bytes).to_bytes())
    remove_parts(path)
    return cut


def grow(
    path: str | os.PathLike[str],
    mb: Budget | None,
    source: str | os.PathLike[str] | Reader,
    progress: Progress | None = None,
    *,
    budget: int | None = None,
) -> Cut:
    """Grow a file to at most `mb` megabytes (2**20 bytes), both as a file and as weights in memory.

    The result is byte for byte what `truncate` makes of the larger file with the same budget, or the larger file itself if
    all of it fits and it is whole. Only the missing bytes are read from `source`; each chunk is checked against its digest
    before its last byte is written.

    The missing bytes are appended to the file itself, after its own blocks were checked. Nothing is changed before the first
    of them have arrived. From then on the file is partial until it is complete: a valid model, at least as large as before,
    and not sealed. If growing fails or is stopped, the file stays so, and the same call continues from there.

    Parameters
    ----------
    path : path
        The file to grow: sealed or partial.
    mb, budget : number or str, int
        The budget: megabytes, or None and bytes instead.
    source : path, URL or Reader
        A larger file of the same model. A reader is left open.
    progress : callable or None
        Called with the number of bytes of each piece appended.

    Returns
    -------
    Cut
        What the file is now.

    Raises
    ------
    UsageError
        There is nothing to add within `mb`; `source` is `path` or of another model; another process cuts or grows the file,
        or replaced or deleted it while it grew.
    BudgetError
        `mb` is below the base model.
    NotBstkError, DamagedError, UnsupportedVersionError
        One of the two is not a valid file, a chunk is damaged, or this package can read the file but not rewrite it.
    RemoteError, ResourceError, OutputError
        The URL cannot be read, or the file cannot be written.
    """
    budget = budget_of(mb, budget)
    with open(path, warn=False) as small:  # an invalid file is refused before a server is asked
        require_rewritable(small)
    if isinstance(source, Reader):
        return _grow(path, budget, source, progress)
    with open(source, warn=False) as larger:
        return _grow(path, budget, larger, progress)


def plan_growth(small: Reader, larger: Reader, *, budget: int) -> Cut:
    """Return what `grow` would make of an open file within `budget` bytes, or raise its errors."""
    name, other = small.source.name, larger.source.name
    require_rewritable(small)
    if small.root != larger.root:
        raise UsageError(
            f"{name}: {other} belongs to another model: its root digest is {larger.root.hex()}, that of {name} is "
            f"{small.root.hex()}.",
            hint="Grow it from the file it was cut from.",
        )
    if os.path.exists(other) and os.path.samefile(name, other):
        raise UsageError(f"{name}: the file cannot grow from itself.", hint="Name a larger file of the same model.")
    cut = larger.fit(budget=budget)
    here = small.fit()
    # A partial file that has all blocks already still gets its seal.
    if cut.chunks < here.chunks or (cut.chunks == here.chunks and small.state != "partial"):
        available = mb_ceil(larger.fit().budget)
        if here.chunks >= len(larger.chunks):
            why = f"{other} has no more than it, {available} MB."
            hint = "Name a larger file of the same model."
        else:
            why = (
                f"it takes {mb_ceil(here.budget)} MB already, and the next block does not fit in {mb_text(budget)} MB."
            )
            hint = f"Give a larger budget; all of {other} takes {available} MB."
        raise UsageError(f"{name}: nothing to add: {why}", hint=hint)
    return cut


def _grow(path: str | os.PathLike[str], budget: int, larger: Reader, progress: Progress | None) -> Cut:
    with LockedFile(path) as file:
        remove_leftovers(os.path.realpath(path))
        try:
            cut = _append(file, budget, larger, progress)
        except RemoteChangedError:
            cut = _append(file, budget, reopen(larger), progress)
        file.require_there()
    remove_parts(path, larger.source.name)
    return cut


def _append(file: LockedFile, budget: int, larger: Reader, progress: Progress | None) -> Cut:
    """Unseal, append, seal, each on disk before the next begins: unsealed, the file is valid at every length."""
    small = open(file, warn=False)
    cut = plan_growth(small, larger, budget=budget)
    kept = intact(file, small.chunks)
    if damaged := next((chunk for chunk in small.chunks if chunk.end > kept), None):
        raise DamagedError(
            f"{file.name}: {damaged.describe()}: its SHA-256 does not match the index.",
            hint="Copy, download or cut the file again.",
            chunk=damaged,
        )

    def unseal() -> None:
        if small.seal:
            overwrite_preamble(file, small.preamble.sealed(0).to_bytes())

    extend(file, larger, larger.all_chunks[: cut.chunks], progress, before=unseal)
    with os_errors(file.name):
        if file.length > cut.file_bytes:  # the beginning of a chunk that does not fit
            file.shorten(cut.file_bytes)
        file.sync()
    seal = 0 if cut.file_bytes == larger.full_length else cut.file_bytes
    overwrite_preamble(file, small.preamble.sealed(seal).to_bytes())
    return cut
