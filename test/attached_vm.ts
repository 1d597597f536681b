// The other thread of the tests of Vm.attach: does what it is told, and answers.
import { parentPort, workerData } from 'node:worker_threads';
import { type KvmError, Vm } from '../lib/index.ts';

const vm = Vm.attach(workerData);
let view: Uint8Array | null = null;

function attempt(run: () => unknown): unknown {
  try {
    return run();
  } catch (error) {
    return (error as KvmError).code;
  }
}

const commands: Record<string, (...args: number[]) => unknown> = {
  slots: () =>
    [...vm.memslots.values()].map(({ slot, address, size, hostMemory, guestMemfd, readonly }) => {
      return { slot, address, size, host: hostMemory?.kind ?? null, file: guestMemfd?.size ?? null, readonly };
    }),
  read: (address = 0, length = 0) => attempt(() => [...vm.memory.read(address, length)]),
  write: (address = 0, byte = 0) => attempt(() => vm.memory.write(address, Uint8Array.of(byte))),
  view: (address = 0, length = 0) => {
    view = vm.memory.view(address, length);
    return view[0];
  },
  viewed: () => {
    vm.memslotAt(0);
    return view?.length;
  },
  hostBytes: (slot = 0, at = 0) => vm.memslots.get(slot)?.hostMemory?.bytes()[at],
  state: (address = 0, size = 0) => vm.attributes.state({ address, size }),
  resident: (slot = 0) => vm.memslots.get(slot)?.guestMemfd?.residentBytes(),
  capability: () => vm.checkExtension('NR_MEMSLOTS'),
  kvm: () => [vm.kvm.backend, vm.kvm.pageSize, vm.type],
  refusals: () => {
    const slot = vm.memslots.get(0);
    const size = vm.kvm.pageSize;
    const host = vm.kvm.createHostMemory({ size });
    const codes = [
      attempt(() => vm.createMemslot({ address: 1 << 30, size, hostMemory: host })),
      attempt(() => vm.createGuestMemfd({ size })),
      attempt(() => vm.convertSync({ address: 0, size }, 'private')),
      attempt(() => vm.setMemoryAttributes({ address: 0, size }, { private: true })),
      attempt(() => slot?.move(1 << 30)),
      attempt(() => slot?.remove()),
      attempt(() => slot?.setLogDirtyPages(true)),
      attempt(() => slot?.dirtyPages()),
      attempt(() => slot?.clearDirtyPages()),
      attempt(() => slot?.hostMemory?.close()),
    ];
    host.close();
    return codes;
  },
  vcpu: () => {
    const vcpu = vm.createVcpu();
    const { id } = vcpu;
    vcpu.close();
    return id;
  },
  closed: () => vm.closed,
  close: () => vm.close(),
};

parentPort?.on('message', ([name, ...args]: [string, ...number[]]) => {
  parentPort?.postMessage(commands[name]?.(...args));
  if (name === 'close') parentPort?.close();
});
