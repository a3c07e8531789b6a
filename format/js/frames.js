/** What a chunk's zstd frame must look like (SPEC.md, section 6; RFC 8878), checked without decoding it. */

import { DamagedError } from "./errors.js";

const MAGIC = 0xfd2fb528;
const MAX_WINDOW = 2n ** 23n;
const MAX_BLOCK = 2 ** 17;

/**
 * Follows one frame from its magic to its checksum as the bytes arrive, from block header to block header.
 *
 * It holds at most 18 bytes. `push` and `end` throw a DamagedError whose message starts with `where`.
 */
export class FrameCheck {
  #where;
  #rawLength;
  #step = this.#descriptor;
  #wanted = 5;
  #head = [];
  #skip = 0;
  #maxBlock = MAX_BLOCK;

  constructor(where, rawLength) {
    this.#where = where;
    this.#rawLength = BigInt(rawLength);
  }

  push(piece) {
    let position = 0;
    while (position < piece.length) {
      if (this.#skip) {
        const taken = Math.min(this.#skip, piece.length - position);
        this.#skip -= taken;
        position += taken;
      } else {
        if (!this.#step) this.#fail("there are bytes after its zstd frame");
        this.#head.push(piece[position++]);
        if (this.#head.length === this.#wanted) this.#step();
      }
    }
  }

  end() {
    if (this.#step || this.#skip) this.#fail("its zstd frame is cut off");
  }

  #fail(what) {
    throw new DamagedError(`${this.#where}: ${what}`);
  }

  #number(from, to) {
    return this.#head.slice(from, to).reduceRight((sum, byte) => sum * 256n + BigInt(byte), 0n);
  }

  #descriptor() {
    if (this.#number(0, 4) !== BigInt(MAGIC)) this.#fail("it is not a zstd frame");
    const descriptor = this.#head[4];
    const single = (descriptor >> 5) & 1;
    if (descriptor & 8) this.#fail("a reserved bit of its zstd frame is set");
    if (!(descriptor & 4)) this.#fail("its zstd frame has no checksum");
    if (!(descriptor >> 6) && !single) this.#fail("its zstd frame does not say its content size");
    this.#wanted = 5 + (single ? 0 : 1) + [0, 1, 2, 4][descriptor & 3] + [1, 2, 4, 8][descriptor >> 6];
    this.#step = this.#header;
  }

  #header() {
    const descriptor = this.#head[4];
    const single = (descriptor >> 5) & 1;
    const dictionary = single ? 5 : 6;
    const size = dictionary + [0, 1, 2, 4][descriptor & 3];
    if (this.#number(dictionary, size)) this.#fail("its zstd frame needs a dictionary");
    const content = this.#number(size) + (descriptor >> 6 === 1 ? 256n : 0n);
    let window = content;
    if (!single) {
      const base = 1n << BigInt(10 + (this.#head[5] >> 3));
      window = base + (base / 8n) * BigInt(this.#head[5] & 7);
    }
    if (content !== this.#rawLength) {
      this.#fail(`its zstd frame holds ${content} bytes, and its raw length is ${this.#rawLength}`);
    }
    if (window > MAX_WINDOW) this.#fail(`its zstd window has ${window} bytes; allowed: ${MAX_WINDOW}`);
    this.#maxBlock = Math.min(Number(window), MAX_BLOCK);
    this.#next(this.#block);
  }

  #block() {
    const header = Number(this.#number(0, 3));
    const [last, type, size] = [header & 1, (header >> 1) & 3, header >> 3];
    if (type === 3 || size > this.#maxBlock) this.#fail("a block of its zstd frame is damaged");
    this.#skip = type === 1 ? 1 : size;
    if (!last) return this.#next(this.#block);
    this.#skip += 4; // the checksum of the content
    this.#step = null;
  }

  #next(step) {
    this.#head.length = 0;
    this.#wanted = 3;
    this.#step = step;
  }
}
