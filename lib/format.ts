import type { U64 } from './kernel/kernel.ts';
import { GiB, KiB, MiB, TiB } from './uapi.ts';

const units: readonly (readonly [number, string])[] = [
  [TiB, 'TiB'],
  [GiB, 'GiB'],
  [MiB, 'MiB'],
  [KiB, 'KiB'],
];

/** '16 MiB' when that is exact, otherwise hexadecimal: an address or size as a person would write it in a message. */
export function formatBytes(value: U64): string {
  if (typeof value === 'number' && value !== 0) {
    for (const [size, name] of units) {
      if (value % size === 0 && value / size < 1024) return `${value / size} ${name}`;
    }
  }
  return typeof value === 'number' && value < KiB ? String(value) : hex(value);
}

export function hex(value: U64): string {
  return `0x${value.toString(16)}`;
}

/** '[4 GiB, +16 MiB)' */
export function formatRange(address: U64, size: U64): string {
  return `[${formatBytes(address)}, +${formatBytes(size)})`;
}

/** 'a', 'a and b', 'a, b and c' */
export function list(words: readonly string[]): string {
  return words.length < 2 ? words.join('') : `${words.slice(0, -1).join(', ')} and ${words.at(-1)}`;
}
