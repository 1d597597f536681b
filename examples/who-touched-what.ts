// Which pages did the guest touch, and which could it not? The kernel's dirty log tells what was written, and the exits of the vCPU tell what
// was refused: together they make a map, one character for a page. `node dist/examples/who-touched-what.js [software]`
import { type Exit, GuestAgent, Kvm, KvmError, MiB } from 'guest-memfd';

const ROW = 64;

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
using vm = kvm.createVm({ type: kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default' });
const page = kvm.pageSize;
using ram = kvm.createHostMemory({ size: (2 * ROW + 16) * page });

// Three memslots: the agent's own, RAM whose writes are logged, a ROM. Behind the ROM is nothing.
const base = Math.max(1 * MiB, ROW * page);
const rom = base + ROW * page;
vm.createMemslot({ address: 0, size: ROW * page, hostMemory: ram });
const logged = vm.createMemslot({
  address: base,
  size: ROW * page,
  hostMemory: ram,
  hostOffset: ROW * page,
  logDirtyPages: true,
});
vm.createMemslot({ address: rom, size: 16 * page, hostMemory: ram, hostOffset: 2 * ROW * page, readonly: true });

const map = new Map<number, string>();
const mark = (address: number, glyph: string): void => void map.set(Math.floor(address / page) * page, glyph);
const draw = (): void => {
  for (const [name, start] of [['RAM', base] as const, ['ROM, nothing', rom] as const]) {
    const row = Array.from({ length: ROW }, (_, index) => {
      const at = start + index * page;
      return map.get(at) ?? (vm.memslotAt(at) ? '·' : ' ');
    });
    console.log(`${name.padStart(12)} │${row.join('')}│`);
  }
};

// An access without memory behind it comes here. It is marked, and the guest goes on: what it reads is zeros, what it writes is lost.
const onExit = (exit: Exit): 'resume' | 'stop' => {
  if (exit.reason === 'memory-fault') mark(exit.address, 'x');
  if (exit.reason !== 'mmio') return 'stop';
  if (!exit.isWrite) exit.data.fill(0);
  mark(exit.address, exit.isWrite ? '!' : '?');
  return 'resume';
};
using agent = GuestAgent.boot(vm, { onExit });
logged.dirtyPages();

agent.touch({ address: base, size: 24 * page });
for (const index of [1, 2, 3, 5, 8, 13, 21, 34])
  agent.touch({ address: base + index * page, size: page }, { write: true });
agent.fill({ address: base + 40 * page, size: 4 * page }, 0xaa);
agent.touch({ address: rom, size: 20 * page });
agent.touch({ address: rom + 12 * page, size: 2 * page }, { write: true });
agent.write(rom + 24 * page - 4, new Uint8Array(8));
vm.memory.write(base + 50 * page, new Uint8Array(page));

// A private page of a slot without a guest_memfd: the vCPU leaves with a memory fault. Only where there is private memory.
if (vm.capabilities.conversion !== 'none') {
  vm.setMemoryAttributes({ address: base + 56 * page, size: 2 * page }, { private: true });
  try {
    agent.touch({ address: base + 56 * page, size: page });
  } catch (error) {
    if (!(error instanceof KvmError)) throw error;
    console.log(`${error.message.replace(': ', ':\n  ')}\n`);
  }
}

const written = logged.dirtyPages();
for (const index of written) mark(base + index * page, 'W');
console.log(`${kvm.backend}, Linux ${kvm.kernelRelease}: one character is a page of ${page} bytes\n`);
draw();
console.log(`
  · memory that was not written      W written by the guest (dirty log)
  ? read, and nothing is there       ! written, and it is read-only or nothing
  x memory fault: private, and the slot has no guest_memfd

The log named ${written.length} pages: reading is not in it, nor is what the host wrote
(page 50). Asked again, it names ${logged.dirtyPages().length}.`);
