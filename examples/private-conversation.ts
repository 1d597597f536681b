// Guest and host talk through one page that changes sides. The guest asks for each change, as one with private memory does; a policy answers
// it, and says no once. `node dist/examples/private-conversation.js [software]`
import { ConversionPolicy, GuestAgent, Kvm, KvmError, MiB, type Visibility } from 'guest-memfd';

const SIZE = 4 * MiB;
const PAGE = 2 * MiB;
const EACCES = 13;

let kvm = Kvm.open({ backend: process.argv.includes('software') ? 'software' : 'auto' });
if (!kvm.vmTypes.has('sw-protected')) {
  console.log(
    `The KVM of this host (Linux ${kvm.kernelRelease}) has no private memory: this is the software kernel.\n`,
  );
  kvm.close();
  kvm = Kvm.open({ backend: 'software' });
}
const vm = kvm.createVm({ type: 'sw-protected' });
const ram = kvm.createHostMemory({ size: SIZE });
const file = vm.createGuestMemfd({ size: SIZE });
vm.createMemslot({ address: 0, size: SIZE, hostMemory: ram, guestMemfd: file });

// The VMM decides what the guest may have: while it is audited, nothing becomes shared.
let audited = false;
const policy = new ConversionPolicy(vm, { allow: (_, to) => !(audited && to === 'shared') || EACCES });
const agent = GuestAgent.boot(vm, { onExit: policy.handle });
console.log(`${kvm.backend}, Linux ${kvm.kernelRelease}: vCPU ${agent.vcpu.id} asks by ${agent.conversionBy}\n`);

const say = (who: string, what: string): void => console.log(`${who.padEnd(6)} ${what}`);
const text = (bytes: Uint8Array): string => `'${Buffer.from(bytes).toString().replaceAll('\0', '·')}'`;
const ask = (to: Visibility): void => {
  const answer = agent.requestConversion({ address: PAGE, size: kvm.pageSize }, to);
  say('guest', `asks for ${to}: the answer is ${answer}, the page is ${vm.attributes.at(PAGE)}`);
};

vm.memory.write(PAGE, Buffer.from('Your password?'));
say('host', `writes ${text(vm.memory.read(PAGE, 14))}`);
say('guest', `reads  ${text(agent.read(PAGE, 14))}`);

ask('private');
say('guest', `reads  ${text(agent.read(PAGE, 14))}: the private side begins with zeros`);
agent.write(PAGE, Buffer.from('swordfish'));
say('guest', `writes its secret, and reads ${text(agent.read(PAGE, 9))}`);
try {
  vm.memory.read(PAGE, 9);
} catch (error) {
  if (!(error instanceof KvmError) || error.code !== 'EFAULT') throw error;
  say('host', `is refused with ${error.code} at 0x${error.errorOffset?.toString(16)}:\n       ${error.message}`);
}

audited = true;
ask('shared');
say('guest', `still reads ${text(agent.read(PAGE, 9))}`);
audited = false;
ask('shared');
say('host', `reads  ${text(vm.memory.read(PAGE, 9))}: what was private never comes out`);
agent.write(PAGE, Buffer.from('not telling'));
say('guest', 'writes its reply');
say('host', `reads  ${text(vm.memory.read(PAGE, 11))}`);

agent.close();
vm.close();
kvm.close();
