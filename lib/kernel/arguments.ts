import { types } from 'node:util';
import { shown } from '../validate.ts';
import type { U64 } from './kernel.ts';

/** Argument checks of the boundary: what cannot be a system call's argument is a TypeError, everything else reaches the kernel. */

const TWO_64 = 1n << 64n;
const MIN_I64 = -(1n << 63n);
const TWO_54 = 1n << 54n;
const MAX_SAFE = BigInt(Number.MAX_SAFE_INTEGER);

class InvalidArgument extends TypeError {
  readonly code = 'ERR_INVALID_ARG_TYPE';
}

function invalid(name: string, wanted: string, value: unknown): never {
  throw new InvalidArgument(`${name} must be ${wanted}, got ${shown(value)}`);
}

/** In canonical form: a number up to 2^53-1, a bigint above; a negative value as its two's complement. */
export function u64(name: string, value: U64): U64 {
  if (typeof value === 'number') {
    if (Number.isSafeInteger(value)) return value >= 0 ? value + 0 : BigInt(value) + TWO_64;
  } else if (typeof value === 'bigint' && value < TWO_64 && value >= MIN_I64) {
    const unsigned = value < 0n ? value + TWO_64 : value;
    return unsigned <= MAX_SAFE ? Number(unsigned) : unsigned;
  }
  return invalid(name, 'an integer of at most 64 bits (a safe integer or a bigint)', value);
}

/** A 32-bit argument the kernel reads as signed: fds, modes, commands. */
export function i32(name: string, value: number): number {
  if (typeof value === 'number' && Number.isInteger(value) && value >= -0x8000_0000 && value <= 0xffff_ffff)
    return value | 0;
  return invalid(name, 'an integer of at most 32 bits', value);
}

/** A 32-bit argument the kernel reads as unsigned: slot numbers, flags, capabilities. */
export function u32(name: string, value: number): number {
  return i32(name, value) >>> 0;
}

const typedArray = Object.getPrototypeOf(Uint8Array.prototype) as Uint8Array;
const intrinsic = (name: 'buffer' | 'byteOffset' | 'length'): (() => unknown) =>
  Object.getOwnPropertyDescriptor(typedArray, name)?.get as () => unknown;
const [bufferOf, offsetOf, lengthOf] = [intrinsic('buffer'), intrinsic('byteOffset'), intrinsic('length')];

/** A plain view of the same bytes: a subclass, or a property put over `length`, could tell us another size than it has. */
export function bytes(name: string, value: Uint8Array): Uint8Array {
  if (!types.isUint8Array(value)) return invalid(name, 'a Uint8Array', value);
  const length = lengthOf.call(value) as number;
  // Also what a detached or shrunk buffer leaves.
  if (length === 0) return new Uint8Array(0);
  return new Uint8Array(bufferOf.call(value) as ArrayBuffer, offsetOf.call(value) as number, length);
}

export function text(name: string, value: string): string {
  if (typeof value !== 'string' || value.includes('\0')) return invalid(name, 'a string without NUL characters', value);
  return value;
}

// ── arithmetic on canonical values: exact, and without a bigint where numbers will do

export function big(value: U64): bigint {
  return BigInt(value);
}

export function isAligned(value: U64, to: number): boolean {
  return typeof value === 'number' ? value % to === 0 : value % BigInt(to) === 0n;
}

/** Whether a + b reaches or passes 2^64. */
export function wraps(a: U64, b: U64): boolean {
  return typeof a === 'number' && typeof b === 'number' ? false : big(a) + big(b) >= TWO_64;
}

/** Whether a + b, each unsigned, is greater than `limit`. */
export function sumExceeds(a: U64, b: U64, limit: U64): boolean {
  if (typeof a === 'number' && typeof b === 'number') {
    if (typeof limit === 'number') return a > limit - b;
    // Two safe integers stay below 2^54.
    if (limit >= TWO_54) return false;
  }
  return big(a) + big(b) > big(limit);
}

/** The value as the kernel sees it in a signed 64-bit variable is negative. */
export function isNegative(value: U64): boolean {
  return typeof value === 'bigint' && value >= 1n << 63n;
}

/** value / pageSize for an aligned value: at most 2^52, so always a number. */
export function toPages(value: U64, pageSize: number): number {
  return typeof value === 'number' ? value / pageSize : Number(value / BigInt(pageSize));
}

export function isZero(value: U64): boolean {
  return value === 0;
}

/** value & mask for masks of at most 32 bits; `rest` tells whether other bits are set. */
export function low32(value: U64): number {
  return typeof value === 'number' ? value % 0x1_0000_0000 : Number(value & 0xffff_ffffn);
}

/** Whether a bit outside `mask` (32 bits at most) is set. */
export function hasOtherBits(value: U64, mask: number): boolean {
  return (big(value) & ~BigInt(mask)) !== 0n;
}
