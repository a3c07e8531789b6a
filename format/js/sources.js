/**
 * Where bytes come from. A source has `name`, `length`, `read(start, end)` for bytes that fit in memory, `stream(start,
 * end)` for pieces of some MiB, and `close()`. One whose bytes a Blob can refer to without a copy has `part(start, end)`.
 */

import { DamagedError, ResourceError } from "./errors.js";

export const PIECE = 2 ** 22;

/** A Blob or File, which stays where it is until a part of it is read. */
export class BlobSource {
  constructor(blob) {
    this.blob = blob;
    this.name = blob.name ?? "<Blob>";
    this.length = blob.size;
  }

  async read(start, end) {
    let buffer;
    try {
      buffer = await this.part(start, end).arrayBuffer();
    } catch (cause) {
      throw new DamagedError(`bytes ${start} to ${end} cannot be read (${cause.message}); open the file again`, { cause });
    }
    if (buffer.byteLength !== end - start) throw new DamagedError("the file became shorter while it was read; open it again");
    return new Uint8Array(buffer);
  }

  async *stream(start, end) {
    for (; start < end; start += PIECE) yield await this.read(start, Math.min(start + PIECE, end));
  }

  part(start, end) {
    return this.blob.slice(start, end);
  }

  close() {}
}

/** A Uint8Array. The bytes are not copied. */
export class BytesSource {
  name = "<bytes>";

  constructor(bytes) {
    this.bytes = bytes;
    this.length = bytes.length;
  }

  async read(start, end) {
    return this.bytes.subarray(start, end);
  }

  async *stream(start, end) {
    yield this.part(start, end);
  }

  part(start, end) {
    return this.bytes.subarray(start, end);
  }

  close() {}
}

/** Join pieces whose lengths sum to `length`. */
export function concat(pieces, length) {
  if (pieces.length === 1) return pieces[0];
  let joined;
  try {
    joined = new Uint8Array(length);
  } catch (cause) {
    throw new ResourceError(`${length} bytes in one piece are more than this engine gives`, { cause });
  }
  let position = 0;
  for (const piece of pieces) {
    joined.set(piece, position);
    position += piece.length;
  }
  return joined;
}
