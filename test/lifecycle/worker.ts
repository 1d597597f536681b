import { parentPort, workerData } from 'node:worker_threads';
import { Kvm } from '../../lib/index.ts';

// One of many threads: opens everything and leaves it open, and ends in the way it is told to.

const { backend, ending } = workerData as { backend: 'kvm' | 'software'; ending: string };
const MiB = 1 << 20;
const kvm = Kvm.open({ backend });
const type = kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default';
const vm = kvm.createVm({ type });
const open = type === 'default';
const file = vm.createGuestMemfd({ size: 8 * MiB, mmap: open, initShared: open });
const memory = kvm.createHostMemory({ size: 8 * MiB });
vm.createMemslot({ address: 0, size: 8 * MiB, guestMemfd: file, hostMemory: memory });
memory.bytes({ offset: 0, size: MiB }).fill(1);
if (open) file.bytes();
const view = vm.memory.view(0, MiB);
view[0] = 1;
const converting = vm.convert({ address: 0, size: 8 * MiB }, open ? 'shared' : 'private', { chunkSize: 1 << 14 });
converting.catch(() => {});
parentPort?.postMessage('ready');

switch (ending) {
  case 'close':
    await converting;
    kvm.close();
    break;
  case 'exit':
    process.exit(3);
    break;
  case 'throw':
    throw new Error('uncaught');
  case 'busy':
    // The main thread ends this in the middle of a call.
    for (;;) {
      file.allocate();
      file.punchHole();
      memory.discard({ offset: 0, size: MiB });
      vm.memory.write(0, memory.bytes({ offset: MiB, size: MiB }));
    }
  case 'waiting':
    await new Promise(() => setTimeout(() => {}, 60_000));
}
