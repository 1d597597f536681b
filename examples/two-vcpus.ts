// Two vCPUs of one VM pass words to each other through a mailbox in shared memory. One 64-bit word says whether it is empty, and both
// change it with an atomic compare-and-swap only. `node dist/examples/two-vcpus.js [software]`
import { GuestAgent, Kvm, MiB } from 'guest-memfd';

const STATE = 2 * MiB;
const LETTER = STATE + 64;
const [EMPTY, BUSY, FULL] = [0n, 1n, 2n];

using kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
using vm = kvm.createVm();
using ram = kvm.createHostMemory({ size: 4 * MiB });
vm.createMemslot({ address: 0, size: 4 * MiB, hostMemory: ram });

using sender = GuestAgent.boot(vm);
using receiver = GuestAgent.boot(vm);
console.log(
  `${kvm.backend}, Linux ${kvm.kernelRelease}: vCPU ${sender.vcpu.id} sends, vCPU ${receiver.vcpu.id} receives`,
);

const send = (letter: string): boolean => {
  if (sender.compareAndSwap(STATE, EMPTY, BUSY) !== EMPTY) return false;
  sender.write(LETTER, Buffer.from(letter.padEnd(16, '\0')));
  return sender.compareAndSwap(STATE, BUSY, FULL) === BUSY;
};
const receive = (): string | null => {
  if (receiver.compareAndSwap(STATE, FULL, BUSY) !== FULL) return null;
  const letter = Buffer.from(receiver.read(LETTER, 16)).toString().replaceAll('\0', '');
  return receiver.compareAndSwap(STATE, BUSY, EMPTY) === BUSY ? letter : null;
};

// The sender tries twice for each try of the receiver, so it finds the mailbox full now and then.
const letters = ['one', 'page', 'seen', 'by', 'two', 'vCPUs'];
let [next, refused] = [0, 0];
const received: string[] = [];
for (let turn = 0; received.length < letters.length; turn++) {
  const letter = letters[next];
  if (turn % 3 < 2 && letter !== undefined) {
    const sent = send(letter);
    console.log(
      `  vCPU ${sender.vcpu.id}  ${sent ? `puts '${letter}' in` : `cannot put '${letter}' in: the mailbox is full`}`,
    );
    if (sent) next++;
    else refused++;
    continue;
  }
  const got = receive();
  if (got !== null) received.push(got);
  console.log(`  vCPU ${receiver.vcpu.id}  ${got === null ? 'finds nothing' : `takes '${got}' out`}`);
}
console.log(`received: '${received.join(' ')}'; the mailbox was full ${refused} times`);

// A lock: who swaps first has it, and the other vCPU sees whose it is.
const LOCK = STATE + 128;
const [first, second] = [sender, receiver].map((agent) => agent.compareAndSwap(LOCK, 0n, BigInt(agent.vcpu.id) + 1n));
console.log(
  `the lock was ${first === 0n ? 'free' : 'taken'} for vCPU ${sender.vcpu.id}, and then vCPU ${Number(second) - 1}'s`,
);
console.log(
  `both read the same memory: ${sender.checksum({ address: STATE, size: 4096 }) === receiver.checksum({ address: STATE, size: 4096 })}`,
);
