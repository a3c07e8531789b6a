/** What only Node can do: read a path, and write a cut to one. */

import { open as openHandle, rename, rm } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

import { open } from "./bstk.js";
import { BstkError, DamagedError, OutputError, UsageError } from "./errors.js";
import { PIECE } from "./sources.js";

class HandleSource {
  constructor(handle, path, length) {
    this.handle = handle;
    this.name = path;
    this.length = length;
  }

  async read(start, end) {
    const bytes = new Uint8Array(end - start);
    for (let filled = 0; filled < bytes.length; ) {
      const { bytesRead } = await this.handle.read(bytes, filled, Math.min(PIECE, bytes.length - filled), start + filled);
      if (!bytesRead) throw new DamagedError("the file became shorter while it was read; open it again");
      filled += bytesRead;
    }
    return bytes;
  }

  async *stream(start, end) {
    for (; start < end; start += PIECE) yield await this.read(start, Math.min(start + PIECE, end));
  }

  close() {
    return this.handle.close();
  }
}

/** As `open` of bstk.js, for a path. Close the result. */
export async function openPath(path, options = {}) {
  let handle;
  try {
    handle = await openHandle(path, "r");
  } catch (cause) {
    throw new UsageError(`${path}: cannot be opened (${cause.code})`, { cause });
  }
  const found = await handle.stat();
  if (!found.isFile()) {
    await handle.close();
    throw new UsageError(`${path}: is not a regular file`);
  }
  return open(new HandleSource(handle, path, found.size), options);
}

/**
 * Write a cut of an open file to a path, which appears whole or not at all; what is there is replaced.
 *
 * @param {import("./bstk.js").BstkFile} file
 * @param {string} path
 * @param {number|string} megabytes as in `BstkFile.cut`
 * @param {{seal?: boolean}} [options]
 * @returns {Promise<number>} bytes written
 */
export async function writeCut(file, path, megabytes, options = {}) {
  const part = join(dirname(path), `.${basename(path)}.${crypto.randomUUID().slice(0, 8)}.part`);
  let handle;
  let written = 0;
  try {
    for await (const piece of file.cutPieces(megabytes, options)) {
      handle ??= await openHandle(part, "wx"); // not before the budget was found good
      await handle.writeFile(piece);
      written += piece.length;
    }
    await handle.sync();
    await handle.close();
    await rename(part, path);
  } catch (error) {
    await handle?.close().catch(() => {});
    await rm(part, { force: true });
    if (error instanceof BstkError || !error.code) throw error;
    throw new OutputError(`${path}: cannot be written (${error.code})`, { cause: error });
  }
  return written;
}
