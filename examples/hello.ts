// Shares memory with a guest, then makes a part of it private. `node dist/examples/hello.js [software]`
import { Kvm, MiB } from 'guest-memfd';

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
using vm = kvm.createVm({ type: kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default' });
using ram = kvm.createHostMemory({ size: 64 * MiB });
using file = vm.createGuestMemfd({ size: 64 * MiB });
vm.createMemslot({ address: 0, size: 64 * MiB, hostMemory: ram, guestMemfd: file });

vm.memory.write(16 * MiB, Buffer.from('hello, guest'));
console.log(`${kvm.backend}, Linux ${kvm.kernelRelease}: ${Buffer.from(vm.memory.read(16 * MiB, 12))}`);

if (vm.capabilities.conversion === 'none') {
  console.log(`VMs of type '${vm.type}' have no private memory; try: node dist/examples/hello.js software`);
} else {
  const { freedBytes } = await vm.convert({ address: 16 * MiB, size: 8 * MiB }, 'private');
  console.log(`${freedBytes} bytes given back; private now:`, vm.attributes.privateRanges());
}
