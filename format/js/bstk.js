/** Reads, checks and cuts `.bstk` files, in Node and in browsers. Written from format/SPEC.md. */

import { fit } from "./budget.js";
import { checkDigest, checkedPieces } from "./chunks.js";
import { BstkError, DamagedError, PartialError, RootMismatchError, UnsupportedVersionError, UsageError } from "./errors.js";
import { HttpSource } from "./http.js";
import { parseMetadata } from "./metadata.js";
import { parseNames } from "./names.js";
import { PREAMBLE_LENGTH, parsePreamble, rootDigest, stateOf, withSeal } from "./preamble.js";
import { parseRecords } from "./records.js";
import { hex, sha256 } from "./sha256.js";
import { BlobSource, BytesSource } from "./sources.js";
import { checkHoldable, decode, decoder } from "./zstd.js";

export * from "./errors.js";

/**
 * Open a file: read and check its header.
 *
 * @param {Blob|Uint8Array|ArrayBuffer|URL|string|object} from a string is an http or https URL; an object is a source
 *   (sources.js)
 * @param {object} [options]
 * @param {string} [options.root] refuse another root digest than this, 64 hexadecimal digits
 * @param {boolean} [options.strict] refuse a partial file
 * @param {function(string)} [options.warn] called for a partial file; console.warn unless given
 * @param {function(Uint8Array, number)} [options.zstd] decode a zstd frame to a known number of bytes; may be async
 * @param {AbortSignal} [options.signal] ends requests
 * @param {function} [options.fetch] takes the place of the global one
 * @returns {Promise<BstkFile>}
 * @throws {BstkError} of the class that says what is wrong; the message starts with the file's name
 */
export async function open(from, options = {}) {
  const root = options.root === undefined ? undefined : rootFromHex(options.root);
  const source = await sourceOf(from, options);
  try {
    return await naming(source.name, async () => {
      const file = await BstkFile.read(source, options);
      if (root !== undefined && root !== file.root) throw new RootMismatchError(`its root digest is ${file.root}, not ${root}`);
      if (file.state === "partial") {
        const words = `partial: ${file.length} of ${file.fullLength} bytes. It may have been cut on purpose, or by accident`;
        if (options.strict) throw new PartialError(words);
        (options.warn ?? console.warn)(`${source.name}: ${words}`);
      }
      return file;
    });
  } catch (error) {
    await source.close();
    throw error;
  }
}

/** A file whose header is read and good. Use `open`. */
export class BstkFile {
  #source;
  #zstd;
  #header;

  /** All of section 11 up to the metadata, in its order. */
  static async read(source, { zstd } = {}) {
    const first = await source.read(0, Math.min(PREAMBLE_LENGTH, source.length));
    const preamble = parsePreamble(first);
    const state = stateOf(preamble, source.length);
    const header = await source.read(0, preamble.headerLength);
    if (!first.every((byte, i) => byte === header[i])) throw new DamagedError("the file changed while it was read; open it again");
    const { namesOffset, metadataOffset, headerLength } = preamble;
    const part = async (what, start, end, digest) => {
      const bytes = header.subarray(start, end);
      if ((await sha256(bytes)) !== hex(digest)) throw new DamagedError(`${what}: its SHA-256 is not the one in the preamble`);
      return bytes;
    };
    const index = await part("index", PREAMBLE_LENGTH, namesOffset, preamble.indexDigest);
    const table = await part("names table", namesOffset, metadataOffset, preamble.namesDigest);
    const text = await part("metadata", metadataOffset, headerLength, preamble.metadataDigest);
    const all = parseRecords(index, parseNames(table, preamble.chunkCount), preamble);
    if (preamble.seal && !all.some((chunk) => chunk.number >= preamble.baseCount - 1 && chunk.end === source.length)) {
      throw new DamagedError(`sealed at ${preamble.seal} bytes, where no chunk ends`);
    }
    const metadata = parseMetadata(text);
    return new BstkFile({ source, zstd, header, preamble, state, all, metadata, root: await rootDigest(first) });
  }

  constructor({ source, zstd, header, preamble, state, all, metadata, root }) {
    this.#source = source;
    this.#zstd = zstd;
    this.#header = header;
    this.preamble = preamble;
    /** "whole", "partial" or "sealed" */
    this.state = state;
    /** Bytes of this file, and of the complete one. */
    this.length = source.length;
    this.fullLength = preamble.fullLength;
    this.baseLength = preamble.baseLength;
    this.baseCount = preamble.baseCount;
    /** The chunks that are there. */
    this.chunks = all.filter((chunk) => chunk.end <= source.length);
    this.metadata = metadata;
    this.root = root;
    this.memoryBytes = this.chunks.reduce((sum, chunk) => sum + (chunk.isWeight ? chunk.rawLength : 0), 0);
  }

  get name() {
    return this.#source.name;
  }

  /** Requests made so far, for a URL. */
  get requests() {
    return this.#source.requests;
  }

  /** What the largest cut within `megabytes` keeps: `{ chunks, fileBytes, memoryBytes }`; throws a BudgetError. */
  fit(megabytes) {
    return this.#naming(() => fit(this.chunks, this.baseCount, megabytes));
  }

  /**
   * Read all chunks that are there; check their digests and the outer form of their frames.
   *
   * @param {object} [options]
   * @param {string} [options.root] throw a RootMismatchError unless this is the root digest
   * @param {boolean} [options.contents] decode each chunk too, and check what is in it; needs zstd
   * @returns {Promise<{chunks: number, bytes: number, root: string, contents: boolean}>}
   */
  verify({ root, contents = false } = {}) {
    return this.#naming(async () => {
      if (root !== undefined && rootFromHex(root) !== this.root) {
        throw new RootMismatchError(`its root digest is ${this.root}, not ${root}`);
      }
      const zstd = contents ? decoder(this.#zstd) : null;
      if (zstd) {
        for (const chunk of this.chunks) await this.#read(chunk, zstd);
      } else {
        for await (const piece of checkedPieces(this.#source, this.chunks)) void piece;
      }
      return { chunks: this.chunks.length, bytes: this.chunks.at(-1).end, root: this.root, contents };
    });
  }

  /** Return the raw bytes of a chunk of `chunks`, checked. Needs zstd. */
  read(chunk) {
    return this.#naming(() => this.#read(chunk, decoder(this.#zstd)));
  }

  /**
   * Cut: return a Blob of the longest prefix within `megabytes`, each of its chunks checked.
   *
   * @param {number|string} megabytes of 2^20 bytes, for the file and for its weights in memory
   * @param {object} [options]
   * @param {boolean} [options.seal] false to write no seal: then a cut of an unsealed file is a prefix of it, byte for byte
   */
  async cut(megabytes, options = {}) {
    const whole = this.#cutHead(megabytes, options);
    const source = this.#source;
    if (source.part) {
      for await (const piece of this.cutPieces(megabytes, options)) void piece;
      return new Blob([whole.head, source.part(PREAMBLE_LENGTH, whole.end)]);
    }
    const blobs = [];
    for await (const piece of this.cutPieces(megabytes, options)) blobs.push(new Blob([piece])); // a Blob may live on disk
    return new Blob(blobs);
  }

  /** As `cut`, but yield the bytes in pieces. Should a chunk be damaged, this throws before the last byte of it. */
  async *cutPieces(megabytes, options = {}) {
    const { head, end } = this.#cutHead(megabytes, options);
    yield head;
    yield this.#header.slice(PREAMBLE_LENGTH);
    const pieces = checkedPieces(this.#source, this.chunks.filter((chunk) => chunk.end <= end));
    try {
      while (true) {
        const { done, value } = await this.#naming(() => pieces.next());
        if (done) return;
        yield value;
      }
    } finally {
      await pieces.return();
    }
  }

  /** Let go of the file. */
  async close() {
    await this.#source.close();
  }

  #cutHead(megabytes, { seal = true } = {}) {
    return this.#naming(() => {
      if (this.preamble.readOnlyCompatible) {
        const flags = this.preamble.readOnlyCompatible.toString(16);
        throw new UnsupportedVersionError(`read-only-compatible flags 0x${flags} are set: this reader may read it, but not cut it`);
      }
      const { fileBytes: end } = fit(this.chunks, this.baseCount, megabytes);
      if (end === this.length && this.state !== "partial") throw new UsageError(`nothing to cut: all of it fits in ${megabytes} MB`);
      return { head: withSeal(this.#header, seal ? end : 0), end };
    });
  }

  async #read(chunk, zstd) {
    if (this.chunks[chunk?.number] !== chunk) throw new UsageError("read takes one of this file's chunks");
    checkHoldable(chunk);
    const stored = await this.#source.read(chunk.offset, chunk.end);
    checkDigest(chunk, await sha256(stored));
    return decode(chunk, stored, zstd);
  }

  #naming(work) {
    return naming(this.name, work);
  }
}

async function sourceOf(from, options) {
  if (from instanceof Blob) return new BlobSource(from);
  // A view of its own: slice() of Node's Buffer would not copy.
  if (from instanceof Uint8Array) return new BytesSource(new Uint8Array(from.buffer, from.byteOffset, from.length));
  if (from instanceof ArrayBuffer) return new BytesSource(new Uint8Array(from));
  if (typeof from?.stream === "function" && typeof from.read === "function") return from;
  const url = from instanceof URL ? from.href : from;
  if (typeof url !== "string" || !/^https?:\/\//i.test(url) || !URL.canParse(url)) {
    throw new UsageError(`${String(from).slice(0, 200)}: open takes a Blob, a Uint8Array or an http URL; a path, with openPath of node.js`);
  }
  const name = new URL(url);
  return naming(name.origin + name.pathname, () => HttpSource.open(url, options));
}

function rootFromHex(root) {
  if (!/^[0-9a-fA-F]{64}$/.test(root)) throw new UsageError(`a root digest has 64 hexadecimal digits, not "${String(root).slice(0, 80)}"`);
  return root.toLowerCase();
}

/** Run `work`, async or not, and put the file's name in front of the messages of our errors. */
function naming(name, work) {
  const put = (error) => {
    if (error instanceof BstkError && !error.file) {
      error.file = name;
      error.message = `${name}: ${error.message}`;
    }
    throw error;
  };
  try {
    const result = work();
    return result instanceof Promise ? result.catch(put) : result;
  } catch (error) {
    return put(error);
  }
}
