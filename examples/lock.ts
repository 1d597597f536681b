// A guest in a loop over its memory, and a host that wants memory back. What is not locked goes, and comes back by a fault; a locked slot is there
// on every pass, and whoever would take it is refused. `node dist/examples/lock.js [--backend software]`
import { GuestAgent, Kvm, KvmError, MiB } from 'guest-memfd';

const SIZE = MiB;
const PASSES = 3;

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
using vm = kvm.createVm();
const ram = kvm.createHostMemory({ size: 4 * MiB, kind: 'memfd' });
vm.createMemslot({ address: 0, size: 4 * MiB, hostMemory: ram });
const memory = kvm.createHostMemory({ size: SIZE, kind: 'memfd' });
const slot = vm.createMemslot({ address: 16 * MiB, size: SIZE, hostMemory: memory });
const guest = GuestAgent.boot(vm);
console.log(`${kvm.backend}, Linux ${kvm.kernelRelease}, ${kvm.arch}: a guest works on ${SIZE / MiB} MiB`);

// Faults by which KVM gives a guest its pages, which Linux counts on x86-64, and those of this process, by which the host gives them to KVM. A
// KVM without hardware paging emulates this guest, and then all of them are the host's.
const faults = () => [Number(guest.vcpu.statistics().pf_taken ?? 0), process.resourceUsage().minorPageFault] as const;
const pass = (byte: number): void => {
  const before = faults();
  guest.fill(slot, byte);
  const [guests, hosts] = faults().map((count, index) => count - (before[index] ?? 0)) as [number, number];
  const ofHost = kvm.backend === 'kvm' ? `, of the host ${hosts}` : '';
  console.log(`  pass ${byte}: faults of the guest ${guests}${ofHost}; ${slot.residentBytes() / MiB} MiB in memory`);
};
const refused = (what: string, call: () => unknown): void => {
  try {
    call();
    console.log(`  ${what}: done`);
  } catch (error) {
    if (!(error instanceof KvmError)) throw error;
    console.log(`  ${what}: ${error.code}`);
  }
};

console.log('not locked: the host takes everything back before each pass');
for (let byte = 1; byte <= PASSES; byte++) {
  memory.discard({ offset: 0, size: SIZE });
  pass(byte);
}

memory.discard({ offset: 0, size: SIZE });
const { residentBytes, guestMapped, by } = slot.lock('read-write');
console.log(`locked by ${by === 'kernel' ? 'KVM' : 'this process'}: ${residentBytes / MiB} MiB is in memory`);
console.log(`  ${guestMapped ? 'and mapped for the guest' : 'each page is mapped for the guest on its first pass'}`);
for (let byte = 1; byte <= PASSES; byte++) {
  refused('the host wants a page back', () => memory.discard({ offset: 0, size: kvm.pageSize }));
  pass(byte);
}
refused('the slot moves', () => slot.move(64 * MiB));
refused('the slot goes', () => slot.remove());
refused('it is locked again', () => slot.lock('read'));

slot.unlock();
console.log('unlocked: what the guest has mapped stays, until the host takes it');
pass(PASSES + 1);
refused('the host wants everything back', () => memory.discard({ offset: 0, size: SIZE }));
console.log(`  ${slot.residentBytes() / MiB} MiB in memory`);
