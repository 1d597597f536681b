import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream, readFileSync } from 'node:fs';

/** What keeps a machine from running, in words for whoever typed the command. */
export class Problem extends Error {}

/** What a command prints. */
export function output(file: string, args: readonly string[], options: { cwd?: string } = {}): string {
  const { status, stdout, stderr, error } = spawnSync(file, args, { ...options, encoding: 'utf8', maxBuffer: 1 << 26 });
  if (status !== 0) throw new Problem(`${file} ${args.at(-1)}: ${error?.message ?? stderr.trim()}`);
  return stdout;
}

/** Runs a command for minutes: its output goes to a log, of which the end is shown if it fails. */
export async function logged(
  log: string,
  file: string,
  args: readonly string[],
  { cwd, onLine }: { cwd?: string; onLine?: (line: string) => void } = {},
): Promise<void> {
  const running = spawn(file, args, { ...(cwd && { cwd }), stdio: ['ignore', 'pipe', 'pipe'] });
  const copy = createWriteStream(log, { flags: 'a' });
  for (const stream of [running.stdout, running.stderr]) stream.pipe(copy, { end: false });
  running.stdout.on('data', (text: Buffer) => {
    for (const line of text.toString().split('\n')) if (line) onLine?.(line);
  });
  const [status] = await once(running, 'close');
  copy.end();
  await once(copy, 'close');
  if (status !== 0)
    throw new Problem(`${file} failed, see ${log}:\n${readFileSync(log, 'utf8').split('\n').slice(-15).join('\n')}`);
}
