import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { paceVariable, patience } from '../pace.ts';

/** How a program of this folder ended, and what it said. */
export interface Outcome {
  readonly code: number | null;
  readonly signal: string | null;
  readonly output: string;
  readonly errors: string;
}

const LIMIT = 120_000 * patience;

/** Runs a program of this folder in a process of its own. */
export function child(program: string, ...args: string[]): Promise<Outcome> {
  const file = fileURLToPath(new URL(`${program}.js`, import.meta.url));
  // env -i drops what the test runner hands down to every child: hooks that catch signals, and take longer than the programs do.
  const command = [
    '-i',
    `PATH=${process.env.PATH ?? ''}`,
    ...paceVariable,
    process.execPath,
    '--expose-gc',
    file,
    ...args,
  ];
  const running = spawn('env', command, {
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: LIMIT,
    killSignal: 'SIGKILL',
  });
  let [output, errors] = ['', ''];
  running.stdout.on('data', (text) => {
    output += text;
  });
  running.stderr.on('data', (text) => {
    errors += text;
  });
  return new Promise((resolve) => {
    running.on('close', (code, signal) => resolve({ code, signal, output, errors }));
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
