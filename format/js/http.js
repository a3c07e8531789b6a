/** A file behind a URL, read with range requests. */

import {
  RemoteAccessError, RemoteAnswerError, RemoteChangedError, RemoteError, RemoteNotFoundError, TransferError, UnreachableError,
  UsageError,
} from "./errors.js";
import { concat } from "./sources.js";

export const FIRST_REQUEST = 2 ** 16;

/** `fetch` may be replaced, and `signal` ends the requests: both are handed on. Use `HttpSource.open`. */
export class HttpSource {
  requests = 0;

  constructor(url, { fetch = globalThis.fetch, signal } = {}) {
    this.url = new URL(url);
    if (this.url.username || this.url.password) {
      throw new UsageError("a user in a URL is refused by fetch; hand in a fetch that adds an Authorization header");
    }
    this.name = this.url.origin + this.url.pathname; // neither user nor query: both may be secrets
    this.fetch = fetch;
    this.signal = signal;
  }

  /** Ask for the first 64 KiB, which say how long the file is. */
  static async open(url, options) {
    const source = new HttpSource(url, options);
    const answer = await source.#ask(0, FIRST_REQUEST);
    source.version = { etag: answer.headers.get("etag"), modified: answer.headers.get("last-modified") };
    source.length = source.#lengthOf(answer);
    const pieces = [];
    const wanted = Math.min(source.length, FIRST_REQUEST);
    for await (const piece of source.#body(answer, wanted)) pieces.push(piece);
    source.head = concat(pieces, wanted);
    return source;
  }

  async read(start, end) {
    const pieces = [];
    for await (const piece of this.stream(start, end)) pieces.push(piece);
    return concat(pieces, end - start);
  }

  /** What came with the first request is not asked for again. */
  async *stream(start, end) {
    if (start < this.head.length && start < end) yield this.head.subarray(start, Math.min(end, this.head.length));
    start = Math.max(start, this.head.length);
    if (start >= end) return;
    const answer = await this.#ask(start, end);
    await this.#refuse(answer, this.#difference(answer, start, end));
    yield* this.#body(answer, end - start);
  }

  close() {}

  async #ask(start, end) {
    const headers = { Range: `bytes=${start}-${end - 1}` }; // with a range, fetch itself asks for the identity encoding
    const { etag, modified } = this.version ?? {};
    // A weak ETag may not be compared here; #difference compares it all the same.
    if (etag && !etag.startsWith("W/")) headers["If-Range"] = etag;
    else if (!etag && modified) headers["If-Range"] = modified;
    const { fetch } = this;
    let answer;
    this.requests++;
    try {
      answer = await fetch(this.url, { headers, signal: this.signal, cache: "no-store" });
    } catch (cause) {
      if (this.signal?.aborted) throw cause;
      const why = cause.cause?.message ?? cause.message;
      throw new UnreachableError(`no answer from ${this.url.host} (${why}); from a page, the server must also allow it by CORS`, { cause });
    }
    await this.#refuse(answer, this.#fault(answer));
    return answer;
  }

  /** Throw `error` if there is one, and take no more of the answer. */
  async #refuse(answer, error) {
    if (!error) return;
    await answer.body?.cancel().catch(() => {});
    throw error;
  }

  #fault(answer) {
    const { status } = answer;
    if (this.url.protocol === "https:" && answer.url.startsWith("http:")) {
      return new RemoteError(`${this.url.host} leads from https to http; that is refused`);
    }
    if (status === 401 || status === 403) return new RemoteAccessError(`the server says ${status}: no permission`);
    if (status === 404 || status === 410) return new RemoteNotFoundError(`the server says ${status}: there is no such file`);
    if (![200, 206, 416].includes(status)) return new RemoteAnswerError(`the server says ${status}; 206 was expected`);
    const coding = answer.headers.get("content-encoding");
    if (coding && coding !== "identity") {
      return new RemoteAnswerError(`the server compresses its answer (${coding}), although it was asked not to`);
    }
    return null;
  }

  /** Return the length of the file that the first answer states, or refuse the answer. */
  #lengthOf(answer) {
    let length = NaN;
    let what = `the server ignores ranges and sends the whole file; only files of up to ${FIRST_REQUEST} bytes are read so`;
    if (answer.status === 200) {
      length = whole(answer.headers.get("content-length"));
      if (length <= FIRST_REQUEST) return length;
    } else {
      const range = answer.headers.get("content-range") ?? "";
      what = `Content-Range is "${range.slice(0, 100)}"; bytes 0 to ${FIRST_REQUEST - 1} and the file's length were expected `
        + "(from another origin, the server must list Content-Range in Access-Control-Expose-Headers)";
      if (answer.status === 416 && /^bytes \*\/0$/.test(range)) return 0;
      const found = answer.status === 206 && /^bytes 0-(\d+)\/(\d+)$/.exec(range);
      if (found) length = whole(found[2]);
      if (length > 0 && whole(found[1]) === Math.min(length, FIRST_REQUEST) - 1) return length;
    }
    answer.body?.cancel().catch(() => {});
    throw new RemoteAnswerError(what);
  }

  #difference(answer, start, end) {
    const range = answer.headers.get("content-range") ?? "";
    const { etag, modified } = this.version;
    const changed = answer.status !== 206 || answer.headers.get("etag") !== etag || answer.headers.get("last-modified") !== modified;
    if (changed || range.split("/")[1] !== String(this.length)) {
      const how = answer.status === 206 ? `"${range.slice(0, 100)}", ETag ${answer.headers.get("etag")}` : `status ${answer.status}`;
      return new RemoteChangedError(`the file on the server changed while it was read (${how}); open it again`);
    }
    if (range !== `bytes ${start}-${end - 1}/${this.length}`) {
      return new RemoteAnswerError(`the server sends "${range.slice(0, 100)}"; bytes ${start}-${end - 1} were asked for`);
    }
    return null;
  }

  async *#body(answer, wanted) {
    if (!wanted) return;
    const reader = (answer.body ?? new Blob([]).stream()).getReader();
    let found = 0;
    try {
      while (true) {
        const { done, value } = await reader.read();
        if (done) break;
        found += value.length;
        if (found > wanted) throw new RemoteAnswerError(`the server sends more than the ${wanted} bytes it announced`);
        yield value;
      }
    } catch (cause) {
      if (cause instanceof RemoteError || this.signal?.aborted) throw cause;
      throw new TransferError(`the connection broke off after ${found} of ${wanted} bytes; try again`, { cause });
    } finally {
      await reader.cancel().catch(() => {});
    }
    if (found !== wanted) throw new TransferError(`the answer ended after ${found} of ${wanted} bytes; try again`);
  }
}

/** A decimal header field as a Number, or NaN; more than 2^53 is no length. */
function whole(text) {
  return /^\d{1,15}$/.test(text ?? "") ? Number(text) : NaN;
}
