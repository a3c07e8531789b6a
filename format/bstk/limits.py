"""The bounds of the format, which ``SPEC.md`` lists in section "Limits".

With them a reader can refuse a hostile file before it allocates the sizes that the file declares.
"""

MAX_FILE_LENGTH = 2**48
"""Bytes of a complete file. Leaves sums of lengths far from 64-bit overflow in readers that have no big integers."""

MAX_CHUNKS = 2**21
"""Chunks of a complete file: 70,000 linears (a mixture of experts with a trillion parameters) of 16 blocks, doubled."""

MAX_NAME_LENGTH = 1024
"""UTF-8 bytes of one name."""

MAX_NAMES_LENGTH = 2**27
"""Bytes of the names table."""

MAX_METADATA_LENGTH = 2**22
"""Bytes of the metadata; anything larger belongs in a chunk."""

MAX_METADATA_DEPTH = 32
"""Nesting of objects and arrays in the metadata, the top-level object being the first level."""

MAX_METADATA_STRUCTURE = 2**18
"""Number of the characters ``[ { , :`` in the metadata outside strings. Each value has one or two of them and takes a hundred
bytes of memory, so the length alone does not bound the memory of small values."""

MAX_NDIM = 4
"""Dimensions of a tensor: the record has room for four."""

MAX_DIMENSION = 2**31 - 1
"""Length of one dimension: fits a signed 32-bit integer, which numeric libraries still use for shapes."""

MAX_RAW_LENGTH = 2**31
"""Bytes of one decoded chunk. A larger parameter is written as several row ranges."""

MAX_FILES_LENGTH = 2**28
"""Decoded bytes of all embedded files together, which loading writes to disk and no budget counts. Tokenizers, the largest of
them, take less than 64 MiB."""

EXPANSION_SLACK = 2**20
MAX_EXPANSION = 1024
"""A chunk of s stored bytes decodes to at most ``EXPANSION_SLACK + MAX_EXPANSION * s`` bytes; zstd alone would allow 2 GiB from
64 KiB."""

MAX_WINDOW_LENGTH = 2**23
"""Bytes of a zstd window, which RFC 8878 requires every decoder to support."""
