import { setTimeout as wait } from 'node:timers/promises';
import type { FileRange } from '../lib/index.ts';

/** A source for test/pager.test.ts: every page says where it is from. */
export interface Plan {
  readonly pageSize: number;
  /** Fails for ranges that reach it. */
  readonly failAt?: number;
  readonly failure?: 'throw' | 'exit' | 'short' | 'nothing';
  /** Milliseconds of each answer. */
  readonly delay?: number;
  /** Ranges from here on are zeros. */
  readonly zerosFrom?: number;
  readonly setupFails?: boolean;
}

let plan: Plan;

/** What the page at an offset holds. */
export function pageByte(offset: number, pageSize: number): number {
  return ((offset / pageSize) % 251) + 1;
}

export function setup(given: Plan): void {
  plan = given;
  if (plan.setupFails) throw new Error('no source here');
}

export async function onMissing({ offset, size }: FileRange): Promise<Uint8Array | null> {
  const {
    pageSize,
    failAt = Number.POSITIVE_INFINITY,
    failure = 'throw',
    delay,
    zerosFrom = Number.POSITIVE_INFINITY,
  } = plan;
  if (delay) await wait(delay);
  if (offset + size > failAt) {
    if (failure === 'exit') process.exit(1);
    if (failure === 'short') return new Uint8Array(size - 1);
    if (failure === 'nothing') return undefined as never;
    throw new Error('the line is dead');
  }
  if (offset >= zerosFrom) return null;
  const content = new Uint8Array(size);
  for (let at = 0; at < Math.min(size, zerosFrom - offset); at += pageSize)
    content.fill(pageByte(offset + at, pageSize), at, at + pageSize);
  return content;
}
