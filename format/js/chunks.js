/** Stored chunks, each checked against its digest and its frame's outer form before its last byte is given away. */

import { DamagedError } from "./errors.js";
import { FrameCheck } from "./frames.js";
import { Sha256, sha256 } from "./sha256.js";
import { concat } from "./sources.js";

/** Up to here a chunk is taken in one piece, and crypto.subtle does the work. */
const SMALL = 2 ** 24;

/** Yield the bytes of `chunks`, which follow one another in the file, in pieces. All are read as one stream. */
export async function* checkedPieces(source, chunks) {
  if (!chunks.length) return;
  const pieces = new Pieces(source.stream(chunks[0].offset, chunks.at(-1).end));
  try {
    for (const chunk of chunks) yield* chunk.storedLength <= SMALL ? small(chunk, pieces) : large(chunk, pieces);
  } finally {
    await pieces.close();
  }
}

async function* small(chunk, pieces) {
  const parts = [];
  for (let left = chunk.storedLength; left > 0; left -= parts.at(-1).length) parts.push(await pieces.take(left));
  const stored = concat(parts, chunk.storedLength);
  checkDigest(chunk, await sha256(stored));
  const frame = new FrameCheck(chunk.where, chunk.rawLength);
  frame.push(stored);
  frame.end();
  yield stored;
}

async function* large(chunk, pieces) {
  const digest = new Sha256();
  const frame = new FrameCheck(chunk.where, chunk.rawLength);
  for (let left = chunk.storedLength; left > 0; ) {
    const piece = await pieces.take(left);
    left -= piece.length;
    digest.update(piece);
    if (left) {
      frame.push(piece);
      yield piece;
    } else {
      checkDigest(chunk, digest.hex());
      frame.push(piece);
      frame.end();
      yield piece;
    }
  }
}

/** Throw a DamagedError where a digest is not the one in the index. */
export function checkDigest(chunk, found) {
  if (found !== chunk.digest) throw new DamagedError(`${chunk.where}: its SHA-256 is not the one in the index`);
}

/** Pieces of a stream, split where they are wanted. */
class Pieces {
  #iterator;
  #rest = new Uint8Array(0);

  constructor(stream) {
    this.#iterator = stream[Symbol.asyncIterator]();
  }

  /** Return 1 to `length` bytes. */
  async take(length) {
    while (!this.#rest.length) {
      const { done, value } = await this.#iterator.next();
      if (done) throw new DamagedError("the file became shorter while it was read; open it again");
      this.#rest = value;
    }
    const piece = this.#rest.subarray(0, length);
    this.#rest = this.#rest.subarray(piece.length);
    return piece;
  }

  async close() {
    await this.#iterator.return?.();
  }
}
