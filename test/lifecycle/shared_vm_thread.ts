import { parentPort, workerData } from 'node:worker_threads';
import { Kvm, type KvmError, MiB, Vm, type VmHandle } from '../../lib/index.ts';

// A thread of shared_vm.ts: it owns a VM, or runs a guest that never stops.

const { role, handle } = workerData as { role: 'owner' | 'runner'; handle: VmHandle };
if (role === 'owner') {
  const kvm = Kvm.open({ backend: 'kvm' });
  const vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
  vm.memory.write(0x1000, Uint8Array.from(process.arch === 'arm64' ? [0, 0, 0, 0x14] : [0xeb, 0xfe]));
  parentPort?.postMessage(vm.handle);
  setInterval(() => {}, 60_000);
} else {
  const vm = Vm.attach(handle);
  const vcpu = vm.createVcpu();
  if (process.arch === 'arm64') {
    vcpu.setRegisters({ pc: 0x1000n });
  } else {
    vcpu.setRegisters({ rip: 0x1000n, rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n });
  }
  parentPort?.postMessage('running');
  try {
    while (vcpu.run({ timeout: 60_000 }));
  } catch (error) {
    if ((error as KvmError).code !== 'ERR_CLOSED') throw error;
  }
  vm.close();
}
