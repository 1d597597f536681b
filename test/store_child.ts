// A VMM of its own for store.test.ts: does one thing with a store, and then is killed, or says what it found.
import { GuestAgent, Kvm, type ModelOptions, type VmType } from '../lib/index.ts';

const [task = '', path = '', backend = '', type = 'default'] = process.argv.slice(2);
const model = JSON.parse(backend) as ModelOptions | null;
const kvm = Kvm.open(model ? { backend: 'software', model } : { backend: 'kvm' });
const P = kvm.pageSize;
const vm = kvm.createVm({ type: type as VmType });

/** Places of the layout, in pages. */
const [SECOND, SECRET, HELD] = [1024, 1026, 1025];

if (task === 'live') {
  const store = kvm.openStore(path);
  const memory = store.create('guest', { size: 64 * P, tags: { disk: 'sda' } });
  const file = type === 'default' ? undefined : vm.createGuestMemfd({ size: 16 * P });
  vm.createMemslot({ address: 0, size: 48 * P, hostMemory: memory.hostMemory });
  vm.createMemslot({
    ...{ slot: 7, address: SECOND * P, size: 16 * P, hostMemory: memory.hostMemory, hostOffset: 48 * P },
    ...(file && { guestMemfd: file }),
  });
  if (file) vm.setMemoryAttributes({ address: SECRET * P, size: 2 * P }, { private: true });
  vm.addMemoryUser({ name: 'nic' }).hold({ address: HELD * P + 3, size: 17 });
  vm.addMemoryUser({ name: 'idle' });
  memory.record(vm);
  vm.memory.write(40 * P + 5, Buffer.from('by the host'));
  const agent = GuestAgent.boot(vm);
  agent.write(SECOND * P + 9, Buffer.from('by the guest'));
  process.kill(process.pid, 'SIGKILL');
} else if (task === 'snapshot') {
  const store = kvm.openStore(path);
  const memory = kvm.createHostMemory({ size: 64 * P });
  vm.createMemslot({ address: P, size: 32 * P, hostMemory: memory, hostOffset: 16 * P });
  vm.memory.write(3 * P, Buffer.from('kept'));
  const vcpu = vm.createVcpu(2);
  vcpu.setRegisters(
    kvm.arch === 'aarch64' ? { x7: 0x1234n, pc: 0x8000n } : { rax: 0x1234n, rip: 0x8000n, 'gs.base': 0x77n },
  );
  store.snapshot(vm, 'still', { vcpus: [vcpu] });
  kvm.close();
} else if (task === 'restore') {
  const store = kvm.openStore(path, { readOnly: true });
  const { vcpus } = store.restore(vm, 'still');
  const registers = vcpus[0]?.getRegisters() ?? {};
  const [slot] = vm.memslots.values();
  const found = {
    id: vcpus[0]?.id,
    registers: [registers.rax ?? registers.x7, registers.rip ?? registers.pc, registers['gs.base'] ?? 0x77n].map(
      Number,
    ),
    slot: [slot?.slot, slot?.address, slot?.size, slot?.hostOffset].map(
      (value) => (value ?? 0) / (value === slot?.slot ? 1 : P),
    ),
    text: Buffer.from(vm.memory.read(3 * P, 4)).toString(),
  };
  kvm.close();
  console.log(JSON.stringify(found));
}
