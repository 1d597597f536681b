import { readFileSync } from 'node:fs';
import { setTimeout as wait } from 'node:timers/promises';
import { Kvm } from '../../lib/index.ts';
import { openFiles } from '../backends.ts';

// Objects that nobody closes. Argument: backend. Prints, for each program, the warnings it led to and what was left open.

const backend = process.argv[2] as 'kvm' | 'software';
const MiB = 1 << 20;
const warnings: string[] = [];
process.on('warning', (warning: Error & { code?: string }) => {
  warnings.push(warning.code === 'GUEST_MEMFD_LEAK' ? warning.message : `other: ${warning.message}`);
});

async function collect(): Promise<void> {
  for (let round = 0; round < 8; round++) {
    (globalThis as unknown as { gc(): void }).gc();
    await wait(2);
  }
}

const mappings = () => readFileSync('/proc/self/maps', 'utf8').split('\n').length;
const kept: Uint8Array[] = [];
const open = () => Kvm.open({ backend });
const shared = (kvm: Kvm) => kvm.createVm().createGuestMemfd({ size: MiB, mmap: true, initShared: true });

const programs: Readonly<Record<string, () => unknown>> = {
  kvm: () => open(),
  vm: () => open().createVm(),
  'host memory': () => open().createHostMemory({ size: MiB, kind: 'memfd' }),
  'host memory with a view': () => open().createHostMemory({ size: MiB }).bytes().fill(1),
  guest_memfd: () => open().createVm().createGuestMemfd({ size: MiB }),
  'guest_memfd with a view': () => shared(open()).bytes().fill(1),
  'slot and view': () => {
    const kvm = open();
    const vm = kvm.createVm();
    vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
    vm.createMemslot({
      address: MiB,
      size: MiB,
      guestMemfd: vm.createGuestMemfd({ size: MiB, mmap: true, initShared: true }),
    });
    vm.memory.view(0, MiB).fill(1);
    vm.memory.view(MiB, MiB).fill(1);
    vm.memory.read(0, 2 * MiB);
  },
  conversion: async () => {
    const kvm = open();
    const vm = kvm.createVm();
    await vm.convert({ address: 0, size: MiB }, 'shared');
    vm.attributes.privateRanges();
    void vm.capabilities;
  },
  closed: () => {
    using kvm = open();
    const vm = kvm.createVm();
    vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
  },
};

const report: Record<string, { warnings: string[]; files: string[]; mappings: number }> = {};
// What Node sets up once is not ours.
await (async () => programs.closed?.())();
await collect();
for (const [name, program] of Object.entries(programs)) {
  const before = mappings();
  await (async () => {
    await program();
  })();
  await collect();
  report[name] = { warnings: warnings.splice(0), files: openFiles(), mappings: Math.max(0, mappings() - before - 8) };
}

// A view is all that is left of what it shows, and enough to keep it.
(() => {
  const kvm = open();
  const memory = kvm.createHostMemory({ size: MiB });
  const vm = kvm.createVm();
  const file = vm.createGuestMemfd({ size: MiB, mmap: true, initShared: true });
  vm.createMemslot({ address: 0, size: MiB, guestMemfd: file });
  kept.push(memory.bytes(), file.bytes({ offset: MiB / 2, size: MiB / 4 }), vm.memory.view(4096, 4096));
})();
await collect();
const alive = kept.map((view) => {
  view.fill(3);
  return view.length > 0 && view.every((byte) => byte === 3);
});
const warned = warnings.splice(0).filter((text) => /host memory|guest_memfd/.test(text)).length;
kept.length = 0;
await collect();
console.log(JSON.stringify({ report, kept: { alive, warned, later: warnings.length, files: openFiles() } }));
