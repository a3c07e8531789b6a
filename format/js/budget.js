/** Budgets in megabytes of 2^20 bytes (SPEC.md, section 10). */

import { BudgetError, UsageError } from "./errors.js";

const DECIMAL = /^\s*\+?(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?\s*$/;
const MAX_DIGITS = 100;

/** Return the whole bytes in a budget: a string is a decimal, a number is exactly the binary fraction that it is. */
export function budgetBytes(megabytes) {
  const wrong = () => new UsageError(`a budget of ${String(megabytes).slice(0, 100)} MB; write a number above 0, such as 62.5`);
  if (typeof megabytes === "bigint") megabytes = megabytes.toString();
  if (typeof megabytes === "number") {
    if (!Number.isFinite(megabytes) || megabytes <= 0) throw wrong();
    return Math.floor(megabytes * 2 ** 20); // a power of two: exact
  }
  const found = typeof megabytes === "string" && megabytes.length <= MAX_DIGITS ? DECIMAL.exec(megabytes) : null;
  if (!found) throw wrong();
  const [, whole, fraction = "", exponent = "0"] = found;
  if (!whole && !fraction) throw wrong();
  const scale = Number(exponent) - fraction.length;
  const digits = BigInt(whole + fraction) << 20n;
  if (!digits) throw wrong();
  return Number(scale < 0 ? digits / 10n ** BigInt(-scale) : digits * 10n ** BigInt(scale));
}

/** Return the longest prefix of `chunks` within a budget: `{ chunks, fileBytes, memoryBytes }`. */
export function fit(chunks, baseCount, megabytes) {
  const budget = budgetBytes(megabytes);
  let best = null;
  let memoryBytes = 0;
  for (const chunk of chunks) {
    if (chunk.isWeight) memoryBytes += chunk.rawLength;
    if (chunk.number < baseCount - 1) continue;
    const cut = { chunks: chunk.number + 1, fileBytes: chunk.end, memoryBytes };
    if (Math.max(cut.fileBytes, cut.memoryBytes) > budget) {
      if (best) break;
      const smallest = Math.max(cut.fileBytes, cut.memoryBytes);
      const works = Math.ceil((smallest / 2 ** 20) * 100) / 100;
      throw new BudgetError(`${megabytes} MB is below the base model, which needs ${smallest} bytes: ${works} MB work`);
    }
    best = cut;
  }
  return best;
}
