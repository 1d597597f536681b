import v8 from 'node:v8';
import { Kvm, MiB } from '../../lib/index.ts';

// A VMM whose guest writes to a port, again and again. Prints how many bytes of heap an exit costs.

const EXITS = 50_000;
using kvm = Kvm.open({ backend: 'kvm' });
using vm = kvm.createVm();
vm.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
// out 0x80, al; jmp back
vm.memory.write(0x1000, Uint8Array.of(0xe6, 0x80, 0xeb, 0xfc));
const vcpu = vm.createVcpu();
vcpu.setRegisters({ rip: 0x1000n, rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n });
let sum = 0;
function loop(exits: number): void {
  for (let count = 0; count < exits; count++) {
    const exit = vcpu.run();
    if (exit.reason !== 'io' || exit.port !== 0x80) throw new Error(`the guest stopped with ${exit.reason}`);
    sum += exit.data[0] as number;
  }
}
loop(EXITS);
globalThis.gc?.();
const before = v8.getHeapStatistics().used_heap_size;
loop(EXITS);
console.log((v8.getHeapStatistics().used_heap_size - before) / EXITS);
if (sum !== 0) process.exitCode = 1;
