// A sidecar VM works on a part of another VM's memory: it is carved out of the one, filtered in the other, and returned. Nothing is copied, and at
// no time do both have it. `node dist/examples/sidecar.js [--backend software]`
import { CarveOut, GuestAgent, Kvm, KvmError, MiB } from 'guest-memfd';

const INBOX = 4 * MiB;
const SIDECAR_AT = 2 * MiB;

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
console.log(`${kvm.backend}, Linux ${kvm.kernelRelease}\n`);

const ram = kvm.createHostMemory({ size: 8 * MiB, kind: 'memfd' });
using vm = kvm.createVm();
vm.createMemslot({ address: 0, size: 8 * MiB, hostMemory: ram });
using guest = GuestAgent.boot(vm);

using sidecar = kvm.createVm();
sidecar.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
using filter = GuestAgent.boot(sidecar);

const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();
const ledger = (): void => {
  for (const { range, holder, address } of CarveOut.ledger(vm)) {
    const whose = holder === vm ? 'the VM' : `the sidecar, at ${address / MiB} MiB`;
    console.log(`    ${range.address / MiB} to ${(range.address + range.size) / MiB} MiB: ${whose}`);
  }
};

guest.write(INBOX, Buffer.from('a letter with a secret in it'));
console.log(`the guest writes  '${text(guest.read(INBOX, 28))}', and the VMM carves it out:`);
const carved = CarveOut.create(vm, { address: INBOX, size: MiB }, { to: sidecar, address: SIDECAR_AT });
ledger();

try {
  guest.read(INBOX, 1);
} catch (error) {
  if (!(error instanceof KvmError) || error.code !== 'EFAULT') throw error;
  console.log('the guest         finds no memory there any more, and runs on elsewhere');
}
guest.write(6 * MiB, Buffer.from('meanwhile'));

const letter = text(filter.read(SIDECAR_AT, 28));
const at = letter.indexOf('secret');
filter.write(SIDECAR_AT + at, Buffer.from('******'));
console.log(`the sidecar reads '${letter}',\n                  and blots out six letters; the VMM returns the memory:`);
carved.return();
ledger();
console.log(`the guest reads   '${text(guest.read(INBOX, 28))}'`);
