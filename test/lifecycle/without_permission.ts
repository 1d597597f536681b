import { setgid, setgroups, setuid } from 'node:process';
import { Kvm, type KvmError } from '../../lib/index.ts';

// A user who may not open /dev/kvm: what the library says, and that it still works without. Argument: the user's number.

const id = Number(process.argv[2]);
setgroups?.([]);
setgid?.(id);
setuid?.(id);
let refusal: KvmError | undefined;
try {
  Kvm.open({ backend: 'kvm' }).close();
} catch (error) {
  refusal = error as KvmError;
}
using auto = Kvm.open();
console.log(
  JSON.stringify({
    refusal: refusal && { name: refusal.name, code: refusal.code, message: refusal.message, syscall: refusal.syscall },
    backend: auto.backend,
    fallback: auto.fallbackReason?.code ?? null,
  }),
);
