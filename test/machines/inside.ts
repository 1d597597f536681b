import { type ChildProcessByStdio, spawn } from 'node:child_process';
import type { Readable, Writable } from 'node:stream';
import { fileURLToPath } from 'node:url';

// What runs in a machine: the test files that are its arguments, two at a time. Processes are slow to start there, tap's runner above all,
// so that a process runs one file after the other: inside_lane.ts.

type Lane = ChildProcessByStdio<Writable, Readable, null>;

/** Milliseconds for one file. */
const LIMIT = 1_200_000;
const lane = fileURLToPath(new URL('inside_lane.js', import.meta.url));
const files = process.argv.slice(2);
const waiting = files.values();
let finished = 0;

process.stdout.write(`TAP version 14\n1..${files.length}\n`);
await Promise.all([runLane(), runLane()]);

async function runLane(): Promise<void> {
  let running: Lane | undefined;
  for (const file of waiting) {
    running ??= spawn(process.execPath, ['--expose-gc', lane], {
      env: { ...process.env, TAP_TIMEOUT: '0' },
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    const start = Date.now();
    const { tap, alive } = await run(running, file);
    if (!alive) running = undefined;
    const ok = alive && !/^not ok /m.test(tap);
    const body = tap.replace(/^TAP version .*\n/m, '').replace(/^(?=.)/gm, '    ');
    const end = `${ok ? 'ok' : 'not ok'} ${++finished} - ${file} # time=${Date.now() - start}ms`;
    process.stdout.write(`# Subtest: ${file}\n${body}\n${end}\n`);
    if (!ok) process.exitCode = 1;
  }
  running?.stdin.end();
}

/** What the process prints until it says that the file is over, or is over itself. */
function run(running: Lane, file: string): Promise<{ tap: string; alive: boolean }> {
  let tap = '';
  const timer = setTimeout(() => running.kill('SIGKILL'), LIMIT);
  return new Promise((resolve) => {
    const onData = (data: Buffer): void => {
      tap += data;
      // What a teardown says belongs to the file.
      if (/^(?:not )?ok \d+ - end of file\b.*\n/m.test(tap))
        settle(true, tap.replace(/^(?:# Subtest: |ok \d+ - )end of file\b.*\n/gm, ''));
    };
    const onClose = (status: number | null, signal: string | null): void =>
      settle(false, `${tap}\nnot ok 1 - the process ended: ${signal ?? `status ${status}`}\n`);
    const settle = (alive: boolean, text: string): void => {
      clearTimeout(timer);
      running.stdout.off('data', onData);
      running.off('close', onClose);
      resolve({ tap: text, alive });
    };
    running.stdout.on('data', onData);
    running.on('close', onClose);
    running.stdin.write(`${file}\n`);
  });
}
