import type { FileRange } from './guest_range.ts';

/**
 * Argument checks of the objects, made before any system call: a wrong type is a `TypeError` `ERR_INVALID_ARG_TYPE`, a number that cannot
 * be an address, size or count is a `RangeError` `ERR_OUT_OF_RANGE`.
 */

export function typeError(message: string): TypeError {
  return Object.assign(new TypeError(message), { code: 'ERR_INVALID_ARG_TYPE' });
}

export function rangeError(message: string): RangeError {
  return Object.assign(new RangeError(message), { code: 'ERR_OUT_OF_RANGE' });
}

/** A value as a message shows it, whatever it is. */
export function shown(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}…` : value);
  if (typeof value === 'bigint') return `${value}n`;
  if (Array.isArray(value)) return 'an array';
  return typeof value === 'object' && value !== null
    ? 'an object'
    : typeof value === 'function'
      ? 'a function'
      : String(value);
}

/** A safe integer in [min, max]. */
export function integer(name: string, value: unknown, min = 0, max = Number.MAX_SAFE_INTEGER): number {
  if (typeof value !== 'number') throw typeError(`${name} must be a number, got ${shown(value)}`);
  if (!Number.isInteger(value) || value < min || value > max) {
    throw rangeError(`${name} must be an integer from ${min} to ${max}, got ${value}`);
  }
  return value;
}

export function boolean(name: string, value: unknown): boolean {
  if (typeof value !== 'boolean') throw typeError(`${name} must be true or false, got ${shown(value)}`);
  return value;
}

export function oneOf<T extends string>(name: string, value: unknown, allowed: readonly T[]): T {
  if (typeof value !== 'string') throw typeError(`${name} must be a string, got ${shown(value)}`);
  const found = allowed.find((one) => one === value);
  if (found === undefined)
    throw rangeError(`${name} must be one of ${allowed.map(shown).join(', ')}, got ${shown(value)}`);
  return found;
}

export function text(name: string, value: unknown): string {
  if (typeof value !== 'string' || value.includes('\0'))
    throw typeError(`${name} must be a string without NUL characters, got ${shown(value)}`);
  return value;
}

/** An options object; its properties are for the caller to read, each once. */
export function options<T extends object>(name: string, value: T | undefined): T {
  if (typeof value !== 'object' || value === null) throw typeError(`${name} must be an object, got ${shown(value)}`);
  return value;
}

/** An address and a size whose end is a safe integer too. */
export function guestRange(
  name: string,
  value: { readonly address: number; readonly size: number },
): { address: number; size: number } {
  const given = options(name, value);
  const address = integer(`${name}.address`, given.address);
  const size = integer(`${name}.size`, given.size, 1);
  if (!Number.isSafeInteger(address + size)) throw rangeError(`${name} ends past 2^53-1`);
  return { address, size };
}

/** A range of bytes inside something of `limit` bytes; the whole of it when there is none. */
export function fileRange(name: string, value: FileRange | undefined, limit: number): { offset: number; size: number } {
  if (value === undefined) return { offset: 0, size: limit };
  const given = options(name, value);
  const offset = integer(`${name}.offset`, given.offset);
  const size = integer(`${name}.size`, given.size, 1);
  if (offset + size > limit) throw rangeError(`${name} ends at ${offset + size}, past the end, ${limit}`);
  return { offset, size };
}

const isAborted = Object.getOwnPropertyDescriptor(AbortSignal.prototype, 'aborted')?.get;

/** An AbortSignal, and not only something with its prototype. */
export function abortSignal(name: string, value: unknown): AbortSignal {
  try {
    isAborted?.call(value);
    if (value instanceof AbortSignal) return value;
  } catch {
    // Not one: the same error as for anything else.
  }
  throw typeError(`${name} must be an AbortSignal, got ${shown(value)}`);
}
