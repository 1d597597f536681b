// Guest memory that outlives its VMM: one process runs a guest that counts in its memory, and is killed with SIGKILL in the middle of it. Another one
// opens the store, finds the memory by its name, and goes on with it. `node dist/examples/survive.js [software]`
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { GuestAgent, Kvm, MiB } from 'guest-memfd';

const COUNTER = 1 * MiB;
const NOTE = 2 * MiB;
const backend = process.argv.includes('software') ? 'software' : 'auto';
const asVmm = process.argv.indexOf('vmm');

if (asVmm > 0) vmm(process.argv[asVmm + 1] as string);
else await survive();

/** The first VMM. It never ends by itself. */
function vmm(path: string): void {
  const kvm = Kvm.open({ backend });
  const store = kvm.openStore(path);
  const memory = store.create('guest', { size: 64 * MiB, tags: { owner: 'the example' } });
  const vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: 64 * MiB, hostMemory: memory.hostMemory });
  // From here on another process can show the memory as this one does.
  memory.record(vm);
  const agent = GuestAgent.boot(vm);
  agent.write(NOTE, Buffer.from('written by the first guest'));
  for (let count = 0n; ; count++) {
    agent.compareAndSwap(COUNTER, count, count + 1n);
    if (count === 100n) process.stdout.write('counting\n');
  }
}

async function survive(): Promise<void> {
  const path = mkdtempSync(join(tmpdir(), 'survive-'));
  try {
    const args = [fileURLToPath(import.meta.url), backend, 'vmm', path];
    const first = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
    const ended = new Promise<NodeJS.Signals | null>((resolve) => first.on('exit', (_, signal) => resolve(signal)));
    await new Promise((resolve) => first.stdout.once('data', resolve).once('end', resolve));
    first.kill('SIGKILL');
    console.log(`The first VMM, process ${first.pid}, ended with ${await ended}.`);
    successor(path);
  } finally {
    rmSync(path, { recursive: true });
  }
}

function successor(path: string): void {
  using kvm = Kvm.open({ backend });
  using store = kvm.openStore(path);
  using vm = kvm.createVm();
  const { memory } = store.attach(vm, 'guest');
  console.log(`Its successor (${kvm.backend}) finds '${store.list()}' of ${memory?.tags.get('owner')}, with memslots`);
  for (const { slot, address, size } of vm.memslots.values())
    console.log(
      `  ${slot}: ${size / MiB} MiB at ${address}, of which ${memory?.extents().length} extents hold something.`,
    );

  using agent = GuestAgent.boot(vm);
  console.log(`The guest reads '${Buffer.from(agent.read(NOTE, 26))}'`);
  const count = Buffer.from(agent.read(COUNTER, 8)).readBigUInt64LE();
  const counted = agent.compareAndSwap(COUNTER, count, count + 1n) === count;
  console.log(`and a counter that is past 100: ${count > 100n}. It counts on: ${counted}.`);
}
