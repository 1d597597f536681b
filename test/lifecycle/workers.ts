import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as wait } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { Kvm } from '../../lib/index.ts';
import { openFiles } from '../backends.ts';

// Many threads, each with everything open, that end in every way. Arguments: backend, how many. Prints how they ended and what they left.

const backend = process.argv[2] as 'kvm' | 'software';
const count = Number(process.argv[3]);
const endings = ['leave', 'exit', 'busy', 'close', 'throw', 'waiting', 'busy', 'busy', 'leave', 'waiting'];
const ended: Record<string, Record<string, number>> = {};
const mappings = () =>
  readFileSync('/proc/self/maps', 'utf8')
    .split('\n')
    .filter((line) => /kvm|gmem/.test(line)).length;

async function one(ending: string, index: number): Promise<void> {
  const worker = new Worker(new URL('worker.js', import.meta.url), {
    workerData: { backend, ending },
    stderr: true,
    stdout: true,
  });
  const exited = new Promise<number>((resolve) => {
    worker.on('exit', resolve);
  });
  worker.on('error', () => {});
  await new Promise((resolve) => {
    worker.once('message', resolve);
    worker.once('error', resolve);
    worker.once('exit', resolve);
  });
  if (ending === 'busy' || ending === 'waiting') {
    await wait(index % 4);
    await worker.terminate();
  }
  const tally = ended[ending] ?? {};
  ended[ending] = tally;
  const code = String(await exited);
  tally[code] = (tally[code] ?? 0) + 1;
}

using kvm = Kvm.open({ backend });
const vm = kvm.createVm();
const before = { fds: readdirSync('/proc/self/fd').length, files: openFiles(), mappings: mappings() };
const PARALLEL = 4;
let next = 0;
await Promise.all(
  Array.from({ length: PARALLEL }, async () => {
    for (let index = next++; index < count; index = next++) await one(endings[index % endings.length] as string, index);
  }),
);
const after = { fds: readdirSync('/proc/self/fd').length, files: openFiles(), mappings: mappings() };
vm.createGuestMemfd({ size: kvm.pageSize });
console.log(JSON.stringify({ ended, before, after }));
