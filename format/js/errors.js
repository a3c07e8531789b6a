/** Error classes with the names and exit codes of docs/guide.md. */

export class BstkError extends Error {
  static exitCode = 1;

  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }

  get exitCode() {
    return this.constructor.exitCode;
  }
}

/** A wrong argument, or nothing to cut. */
export class UsageError extends BstkError {
  static exitCode = 2;
}

/** A cut cannot be written. */
export class OutputError extends BstkError {
  static exitCode = 1;
}

/** The file is partial, and a whole one was asked for. */
export class PartialError extends BstkError {
  static exitCode = 3;
}

/** Not a `.bstk` file. */
export class NotBstkError extends BstkError {
  static exitCode = 4;
}

/** A version or feature that this reader does not know. */
export class UnsupportedVersionError extends BstkError {
  static exitCode = 4;
}

/** A check failed. */
export class DamagedError extends BstkError {
  static exitCode = 5;
}

/** The file ends before its base model. */
export class TruncatedError extends BstkError {
  static exitCode = 5;
}

/** The root digest is another than the one asked for. */
export class RootMismatchError extends BstkError {
  static exitCode = 5;
}

/** The budget is below the base model. */
export class BudgetError extends BstkError {
  static exitCode = 6;
}

/** More than this JavaScript engine holds in one piece. */
export class ResourceError extends BstkError {
  static exitCode = 7;
}

/** Decoding was asked for, and there is no zstd here. */
export class MissingZstdError extends BstkError {
  static exitCode = 1;
}

/** A URL cannot be read. */
export class RemoteError extends BstkError {
  static exitCode = 1;
}

/** No answer. */
export class UnreachableError extends RemoteError {
  static exitCode = 1;
}

/** No permission. */
export class RemoteAccessError extends RemoteError {
  static exitCode = 1;
}

/** An answer that cannot be used. */
export class RemoteAnswerError extends RemoteError {
  static exitCode = 1;
}

/** The file changed while it was read. */
export class RemoteChangedError extends RemoteError {
  static exitCode = 1;
}

/** No such file. */
export class RemoteNotFoundError extends RemoteError {
  static exitCode = 2;
}

/** The connection ended before the answer did. */
export class TransferError extends RemoteError {
  static exitCode = 75;
}
