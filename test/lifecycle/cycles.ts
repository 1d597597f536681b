import { readdirSync, readFileSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import { Kvm } from '../../lib/index.ts';

// Creates and closes everything, many times. Arguments: backend, how often. Prints what the process held after a tenth, and at the end.

const backend = process.argv[2] as 'kvm' | 'software';
const count = Number(process.argv[3]);
const SIZE = 1 << 16;

async function held(): Promise<{ fds: number; mappings: number; rss: number }> {
  for (let round = 0; round < 4; round++) {
    (globalThis as unknown as { gc(): void }).gc();
    await setImmediate();
  }
  return {
    fds: readdirSync('/proc/self/fd').length,
    mappings: readFileSync('/proc/self/maps', 'utf8').split('\n').length,
    rss: process.memoryUsage.rss(),
  };
}

using kvm = Kvm.open({ backend });
const type = kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default';
const open = type === 'default';
const start = performance.now();
let early: Awaited<ReturnType<typeof held>> | undefined;
for (let cycle = 0; cycle < count; cycle++) {
  using vm = kvm.createVm({ type });
  using memory = kvm.createHostMemory({ size: SIZE });
  using file = vm.createGuestMemfd({ size: SIZE, mmap: open, initShared: open });
  using slot = vm.createMemslot({ address: 0, size: SIZE, guestMemfd: file, hostMemory: memory });
  memory.bytes()[0] = 1;
  if (open) file.bytes()[0] = 1;
  vm.memory.view(0, SIZE)[1] = 1;
  vm.convertSync({ address: 0, size: SIZE / 2 }, open ? 'shared' : 'private');
  file.pin({ offset: 0, size: 1 });
  if (slot.removed) throw new Error('the slot is gone');
  if (cycle % 256 === 0) await setImmediate();
  if (cycle === Math.floor(count / 10)) early = await held();
}
const late = await held();
console.log(JSON.stringify({ early, late, milliseconds: Math.round(performance.now() - start) }));
