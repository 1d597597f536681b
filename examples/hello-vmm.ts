// The shortest complete VMM: a guest of sixteen bytes prints through a serial port, and halts.
import { Kvm, KvmError, MiB } from 'guest-memfd';

// mov si, 0x1010; mov dx, 0x3f8; next: lodsb; test al, al; jz done; out dx, al; jmp next; done: hlt; nop
const code = [0xbe, 0x10, 0x10, 0xba, 0xf8, 0x03, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xf4, 0x90];
const text = new TextEncoder().encode('Hello from a guest\n\0');

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
using vm = kvm.createVm();
using ram = kvm.createHostMemory({ size: MiB });
vm.createMemslot({ address: 0, size: MiB, hostMemory: ram });
vm.memory.write(0x1000, Uint8Array.from([...code, ...text]));

using vcpu = vm.createVcpu();
vcpu.setRegisters({ rip: 0x1000n, rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n });
try {
  for (let exit = vcpu.run(); exit.reason !== 'hlt'; exit = vcpu.run()) {
    if (exit.reason !== 'io' || exit.port !== 0x3f8) throw new Error(`the guest stopped with ${exit.reason}`);
    process.stdout.write(exit.data);
  }
} catch (error) {
  if (!(error instanceof KvmError) || error.code !== 'UNSUPPORTED') throw error;
  console.log(`Not here: ${error.message}`);
}
