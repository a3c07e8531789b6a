"""The bounds of the format, which ``SPEC.md`` lists in section "Limits".

With them a reader can refuse a hostile file before it allocates the sizes that the file declares.
"""

# Bytes of a complete file. Leaves sums of lengths far from 64-bit overflow in readers that have no big integers.
MAX_FILE_LENGTH = 2**48
# Chunks of a complete file: 70,000 linears (a mixture of experts with a trillion parameters) of 16 blocks, doubled.
MAX_CHUNKS = 2**21
MAX_NAME_LENGTH = 1024  # UTF-8 bytes
MAX_NAMES_LENGTH = 2**27  # bytes of the names table
MAX_METADATA_LENGTH = 2**22  # bytes; anything larger belongs in a chunk
MAX_METADATA_DEPTH = 32  # nesting of objects and arrays, the top-level object being the first level
# Number of the characters [ { , : in the metadata outside strings. Each value has one or two of them and takes a hundred
# bytes of memory, so the length alone does not bound the memory of small values.
MAX_METADATA_STRUCTURE = 2**18
MAX_NDIM = 4  # dimensions of a tensor: the record has room for four
MAX_DIMENSION = 2**31 - 1  # fits a signed 32-bit integer, which numeric libraries still use for shapes
MAX_RAW_LENGTH = 2**31  # bytes of one decoded chunk; a larger parameter is written as several row ranges
# Decoded bytes of all embedded files together, which loading writes to disk and no budget counts. Tokenizers, the largest of
# them, take less than 64 MiB.
MAX_FILES_LENGTH = 2**28
# A chunk of s stored bytes decodes to at most EXPANSION_SLACK + MAX_EXPANSION * s bytes; zstd alone would allow 2 GiB from
# 64 KiB.
EXPANSION_SLACK = 2**20
MAX_EXPANSION = 1024
MAX_WINDOW_LENGTH = 2**23  # bytes of a zstd window, which RFC 8878 requires every decoder to support
