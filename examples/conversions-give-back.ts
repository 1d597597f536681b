// How much memory do conversions give back? Two guests get the same random conversions of their memory, and after each one the new owner
// writes to it. One guest is converted with vm.convert(), which discards the side that nobody sees any more; in the other only the attribute
// is set, with vm.setMemoryAttributes(). `node dist/examples/conversions-give-back.js [software]`
import { Kvm, MiB, type Visibility } from 'guest-memfd';

const SIZE = 64 * MiB;
const BLOCK = 4 * MiB;
const STEPS = 24;

let kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
if (!kvm.vmTypes.has('sw-protected')) {
  console.log(
    `The KVM of this host (Linux ${kvm.kernelRelease}) has no private memory: this is the software kernel.\n`,
  );
  kvm.close();
  kvm = Kvm.open({ backend: 'software' });
}

const guests = ['convert()', 'setMemoryAttributes()'].map((how) => {
  const vm = kvm.createVm({ type: 'sw-protected' });
  const ram = kvm.createHostMemory({ size: SIZE });
  const file = vm.createGuestMemfd({ size: SIZE });
  vm.createMemslot({ address: 0, size: SIZE, hostMemory: ram, guestMemfd: file });
  vm.memory.write(0, new Uint8Array(SIZE).fill(1));
  return { how, vm, ram, file, freed: 0 };
});

// The same numbers on every run.
let seed = 1;
const random = (below: number): number => {
  seed = (seed * 48271) % 2147483647;
  return seed % below;
};

const line = (...columns: string[]): void => {
  const text = columns.map((column) => column.padEnd(26)).join('');
  console.log(text.trimEnd());
};
const show = (held: number): string =>
  `${'█'.repeat(Math.round(held / (8 * MiB))).padEnd(16, '·')} ${String(held / MiB).padStart(3)} MiB`;
console.log(`${kvm.backend}, Linux ${kvm.kernelRelease}: ${SIZE / MiB} MiB each; bytes held on both sides together`);
line('step', ...guests.map(({ how }) => how));
line('all shared, all written', show(SIZE), show(SIZE));

for (let step = 1; step <= STEPS; step++) {
  const address = random(SIZE / BLOCK) * BLOCK;
  const size = Math.min((1 + random(4)) * BLOCK, SIZE - address);
  const to: Visibility = random(2) ? 'private' : 'shared';
  for (const guest of guests) {
    const { how, vm, file } = guest;
    if (how === 'convert()') guest.freed += (await vm.convert({ address, size }, to)).freedBytes;
    else vm.setMemoryAttributes({ address, size }, { private: to === 'private' });
    // Pages allocated by the host stand in for the writes of a running guest.
    if (to === 'private') file.allocate({ offset: address, size });
    else vm.memory.write(address, new Uint8Array(size).fill(step));
  }
  const what = `${String(step).padStart(2)}  ${address / MiB}–${(address + size) / MiB} MiB to ${to}`;
  const held = guests.map(({ ram, file }) => ram.residentBytes() + file.residentBytes());
  line(what, ...held.map(show));
}

const [converted, attributes] = guests.map(({ ram, file }) => ram.residentBytes() + file.residentBytes());
console.log(`
convert() gave back ${(guests[0]?.freed ?? 0) / MiB} MiB on the way and holds ${(converted ?? 0) / MiB} MiB.
Without the discard ${((attributes ?? 0) - SIZE) / MiB} MiB of ${(attributes ?? 0) / MiB} MiB are held twice.`);
kvm.close();
