import { setTimeout as wait } from 'node:timers/promises';
import { Kvm } from '../../lib/index.ts';
import { linuxKernel, softwareKernel, uapi } from '../../lib/kernel/index.ts';

// A program that ends somewhere in its life, with everything open. Arguments: backend, how far it gets, how it ends.

const [backend, stage, ending] = process.argv.slice(2) as ['kvm' | 'software', string, string];
const MiB = 1 << 20;

function end(): void {
  switch (ending) {
    case 'exit':
      process.exit(7);
      break;
    case 'throw':
      throw new Error('uncaught');
    case 'reject':
      Promise.reject(new Error('unhandled'));
      break;
    case 'SIGTERM':
      process.kill(process.pid, 'SIGTERM');
      break;
    case 'close in exit':
      process.exit(7);
  }
}

if (stage === 'boundary calls') {
  const kernel = backend === 'kvm' ? linuxKernel() : softwareKernel({ kernel: '7.3' });
  const vm = kernel.createVm(kernel.openKvm(), backend === 'kvm' ? 0 : 1);
  const gmem = kernel.createGuestMemfd(vm, { size: 64 * MiB, flags: 0 });
  const mapping = kernel.mmap({
    length: 64 * MiB,
    prot: 3,
    flags: uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS,
    fd: -1,
    offset: 0,
  });
  kernel.window(mapping, 0, MiB).fill(1);
  void kernel.fallocateAsync(gmem, 1, 0, 64 * MiB);
  void kernel.setMemoryAttributesAsync(vm, { address: 0, size: 64 * MiB, attributes: 8, flags: 0 });
  void kernel.madviseAsync(mapping, 0, 64 * MiB, uapi.MADV_DONTNEED);
  end();
} else {
  const kvm = Kvm.open({ backend });
  if (ending === 'close in exit') process.on('exit', () => kvm.close());
  const stages: (() => unknown)[] = [];
  const reach = (name: string, step: () => unknown): void => {
    if (stages.length === 0 || stages.at(-1) !== done) stages.push(step);
    if (name === stage) stages.push(done);
  };
  const done = (): void => {};
  const type = kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default';
  const open = type === 'default';
  let vm: ReturnType<Kvm['createVm']>;
  let file: ReturnType<typeof vm.createGuestMemfd>;
  let memory: ReturnType<Kvm['createHostMemory']>;
  reach('kvm', done);
  reach('vm', () => {
    vm = kvm.createVm({ type });
  });
  reach('guest_memfd', () => {
    file = vm.createGuestMemfd({ size: 16 * MiB, mmap: open, initShared: open });
    file.allocate({ offset: 0, size: MiB });
  });
  reach('window', () => {
    memory = kvm.createHostMemory({ size: 16 * MiB });
    memory.bytes().fill(1);
    if (open) file.bytes().fill(1);
  });
  reach('slot', () => vm.createMemslot({ address: 0, size: 16 * MiB, guestMemfd: file, hostMemory: memory }));
  reach('view', () => vm.memory.view(0, MiB).fill(2));
  reach('pin', () => file.pin({ offset: 0, size: 1 }));
  reach('conversion', () => {
    vm.convert({ address: 0, size: 16 * MiB }, open ? 'shared' : 'private', { chunkSize: 1 << 16 }).catch(() => {});
  });
  reach('conversion at work', async () => {
    await wait(1);
    vm.convert({ address: 0, size: 16 * MiB }, 'shared', { chunkSize: 1 << 12, onProgress: end }).catch(() => {});
  });
  reach('closed', () => kvm.close());
  for (const step of stages) await step();
  end();
}
