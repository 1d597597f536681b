import { spawn } from 'node:child_process';

// What runs in a machine: each test file, named as an argument, in a process of its own. tap's runner takes minutes to start there.

/** Milliseconds for one file, of which tap gets less so that it can say where it was. */
const LIMIT = 300_000;
const files = process.argv.slice(2);
const counter = files.values();
let finished = 0;

process.stdout.write(`TAP version 14\n1..${files.length}\n`);
await Promise.all([lane(), lane()]);

async function lane(): Promise<void> {
  for (const file of counter) {
    const start = Date.now();
    const { ok, tap } = await run(file);
    const body = tap.replace(/^TAP version .*\n/, '').replace(/^(?=.)/gm, '    ');
    const end = `${ok ? 'ok' : 'not ok'} ${++finished} - ${file} # time=${Math.round(Date.now() - start)}ms`;
    process.stdout.write(`# Subtest: ${file}\n${body}\n${end}\n`);
    if (!ok) process.exitCode = 1;
  }
}

function run(file: string): Promise<{ ok: boolean; tap: string }> {
  const running = spawn(process.execPath, ['--expose-gc', file], {
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, TAP_TIMEOUT: String((LIMIT - 20_000) / 1000) },
    timeout: LIMIT,
    killSignal: 'SIGKILL',
  });
  let tap = '';
  running.stdout.setEncoding('utf8').on('data', (text) => {
    tap += text;
  });
  return new Promise((resolve) => {
    running.on('close', (status, signal) => {
      if (signal) tap += `not ok - ended by ${signal}\n`;
      resolve({ ok: status === 0, tap });
    });
  });
}
