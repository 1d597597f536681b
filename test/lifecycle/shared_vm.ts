import { readdirSync, readFileSync } from 'node:fs';
import { Worker } from 'node:worker_threads';
import { Kvm, MiB, Vm, type VmHandle } from '../../lib/index.ts';
import { openFiles } from '../backends.ts';

// A VM on many threads that end in every way, while a guest runs that never stops. Arguments: ending, rounds. Prints what is left.

const ending = process.argv[2] as 'terminate' | 'close' | 'owner' | 'exit' | 'throw';
const rounds = Number(process.argv[3]);
const arm = process.arch === 'arm64';
const endless = arm ? [0, 0, 0, 0x14] : [0xeb, 0xfe];
const script = new URL('shared_vm_thread.js', import.meta.url);
const mappings = () =>
  readFileSync('/proc/self/maps', 'utf8')
    .split('\n')
    .filter((line) => /kvm|gmem/.test(line)).length;
const state = () => ({ fds: readdirSync('/proc/self/fd').length, files: openFiles(), mappings: mappings() });

/** Starts a thread and waits until it says something. */
function start(data: object): Promise<{ worker: Worker; said: unknown; exited: Promise<number> }> {
  const worker = new Worker(script, { workerData: data });
  const exited = new Promise<number>((resolve) => worker.on('exit', resolve));
  return new Promise((resolve, reject) => {
    worker.once('message', (said) => resolve({ worker, said, exited }));
    worker.once('error', reject);
  });
}

function create(kvm: Kvm): Vm {
  const vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
  const guestMemfd = vm.createGuestMemfd({ size: MiB, mmap: true, initShared: true });
  vm.createMemslot({ address: 16 * MiB, size: MiB, guestMemfd });
  vm.memory.write(0x1000, Uint8Array.from(endless));
  return vm;
}

let longest = 0;
async function timed(run: () => Promise<unknown>): Promise<void> {
  const start = performance.now();
  await run();
  longest = Math.max(longest, performance.now() - start);
}

async function round(): Promise<void> {
  using kvm = Kvm.open({ backend: 'kvm' });
  if (ending === 'owner') {
    // The thread that created the VM dies, its memory with it, and this one still has the VM.
    const { worker, said } = await start({ role: 'owner' });
    const vm = Vm.attach(said as VmHandle);
    const runner = await start({ role: 'runner', handle: vm.handle });
    await timed(() => worker.terminate());
    await runner.exited;
    if (vm.memslots.size > 2) throw new Error('more than there was');
    vm.close();
    return;
  }
  const vm = create(kvm);
  const threads = await Promise.all([0, 1].map(() => start({ role: 'runner', handle: vm.handle })));
  if (ending === 'terminate') await timed(() => Promise.all(threads.map(({ worker }) => worker.terminate())));
  if (ending === 'close') {
    await timed(async () => {
      vm.close();
      await Promise.all(threads.map(({ exited }) => exited));
    });
    return;
  }
  if (ending === 'exit') process.exit(7);
  if (ending === 'throw') throw new Error('uncaught');
  vm.memory.write(0, Uint8Array.of(1));
  vm.close();
}

await round();
globalThis.gc?.();
const before = state();
for (let index = 0; index < rounds; index++) await round();
console.log(JSON.stringify({ before, after: state(), longest }));
