import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';

/** How a program of this folder ended, and what it said. */
export interface Outcome {
  readonly code: number | null;
  readonly signal: string | null;
  readonly output: string;
  readonly errors: string;
}

const LIMIT = 120_000;

/** Runs a program of this folder in a process of its own. */
export function child(program: string, ...args: string[]): Promise<Outcome> {
  const file = fileURLToPath(new URL(`${program}.js`, import.meta.url));
  const process_ = spawn(process.execPath, ['--expose-gc', file, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: LIMIT,
    killSignal: 'SIGKILL',
  });
  let [output, errors] = ['', ''];
  process_.stdout.on('data', (text) => {
    output += text;
  });
  process_.stderr.on('data', (text) => {
    errors += text;
  });
  return new Promise((resolve) => {
    process_.on('close', (code, signal) => resolve({ code, signal, output, errors }));
  });
}

/** Does something for each of many, a few at a time. */
export async function concurrently<T>(all: readonly T[], run: (one: T) => Promise<void>, width = 4): Promise<void> {
  let next = 0;
  const lane = async (): Promise<void> => {
    while (next < all.length) await run(all[next++] as T);
  };
  await Promise.all(Array.from({ length: width }, lane));
}
