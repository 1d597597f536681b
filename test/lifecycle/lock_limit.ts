import { Kvm, KvmError, MiB } from '../../lib/index.ts';

// What an ordinary user with a limit of 1 MiB may lock. Prints it as JSON.

const backend = process.argv[2] as 'kvm' | 'software';
const kvm = Kvm.open({ backend, ...(backend === 'software' ? { model: { lockLimit: MiB } } : {}) });
const vm = kvm.createVm();
const memory = kvm.createHostMemory({ size: 2 * MiB });
const slot = vm.createMemslot({ address: 0, size: 2 * MiB, hostMemory: memory });
const small = vm.createMemslot({ address: 4 * MiB, size: MiB / 2, hostMemory: kvm.createHostMemory({ size: MiB }) });
if (process.getuid?.() === 0) {
  process.setgid?.(65534);
  process.setuid?.(65534);
}

function refusal(call: () => unknown): { code: string; message: string } {
  try {
    call();
  } catch (error) {
    if (error instanceof KvmError) return { code: error.code, message: error.message };
    throw error;
  }
  return { code: 'ok', message: '' };
}

const lock = refusal(() => slot.lock('read-write'));
const secret = refusal(() => kvm.createHostMemory({ size: 2 * MiB, kind: 'secret' }));
const left = [slot.locked, memory.residentBytes()];
console.log(JSON.stringify({ lock, secret, left, after: small.lock('read').residentBytes }));
kvm.close();
