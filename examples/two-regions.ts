// The memory of a PC with 6 GiB: a hole for devices lies below 4 GiB, so RAM comes in two memslots. Both are on one guest_memfd that the
// host may map, at two offsets. `node dist/examples/two-regions.js [software]`
import { GiB, Kvm, MiB } from 'guest-memfd';

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
using vm = kvm.createVm();
using file = vm.createGuestMemfd({ size: 6 * GiB, mmap: true, initShared: true });

const below = vm.createMemslot({ address: 0, size: 3 * GiB, guestMemfd: file });
const above = vm.createMemslot({ address: 4 * GiB, size: 3 * GiB, guestMemfd: file, guestMemfdOffset: 3 * GiB });
for (const { slot, address, size, guestMemfdOffset } of [below, above]) {
  const [start, end, offset] = [address, address + size, guestMemfdOffset].map((bytes) => `${bytes / GiB} GiB`);
  console.log(`slot ${slot}: guest memory from ${start} to ${end} is the file from ${offset} on`);
}

// A loader: the kernel goes below the hole, the initial RAM disk above it.
vm.memory.write(1 * MiB, Buffer.from('kernel image'));
vm.memory.write(4 * GiB + 64 * MiB, Buffer.from('initial RAM disk'));

// Guest address 4 GiB + 64 MiB is offset 3 GiB + 64 MiB: the file shows the same bytes.
const inFile = file.bytes({ offset: 3 * GiB + 64 * MiB, size: 16 });
console.log(`the file there: '${Buffer.from(inFile)}'`);

// A view is the memory itself, without a copy.
vm.memory.view(1 * MiB, 12).set(Buffer.from('KERNEL'));
console.log(`guest memory at 1 MiB: '${Buffer.from(vm.memory.read(1 * MiB, 12))}'`);

// Nothing is in the hole, and an access that reaches into it is refused as a whole.
try {
  vm.memory.write(3 * GiB - 8, new Uint8Array(16));
} catch (error) {
  console.log(`refused: ${error instanceof Error ? error.message : error}`);
}

console.log(`held: ${file.residentBytes()} bytes of ${file.size}`);
file.punchHole({ offset: 3 * GiB, size: 3 * GiB });
console.log(`held without what was above: ${file.residentBytes()} bytes`);
