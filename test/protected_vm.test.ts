// A protected VM, whose guest has its memory for itself: on the models of such a host, and on the real one where this is one.
import t from 'tap';
import { GuestAgent, type HostMemory, Kvm, MiB, type ModelOptions } from '../lib/index.ts';
import { backends, openFiles, refused } from './backends.ts';
import { onSoftware } from './pace.ts';

const MEM_SHARE = 0xc600_0003n;
const MEM_UNSHARE = 0xc600_0004n;
const HOME = 1 * MiB;

const models: ModelOptions[] = [4096, 16384].map((pageSize) => ({
  arch: 'aarch64',
  kernel: '7.3',
  pkvm: true,
  pageSize,
}));
const hosts = [
  ...backends.filter(({ model }) => !model),
  ...(onSoftware ? models : []).map((model) => ({
    name: `software, pages of ${model.pageSize}`,
    open: () => Kvm.open({ backend: 'software', model }),
  })),
].filter(({ open }) => {
  using kvm = open();
  return kvm.vmTypes.has('protected');
});
if (hosts.length === 0) t.pass('no host here protects its guests');

for (const { name, open } of hosts) {
  t.test(`a protected VM (${name})`, async (t) => {
    const before = openFiles();
    const kvm = open();
    const P = kvm.pageSize;
    const begin = () => {
      const vm = kvm.createVm({ type: 'protected' });
      const memory = kvm.createHostMemory({ size: 2 * MiB });
      vm.createMemslot({ address: 0, size: 2 * MiB, hostMemory: memory });
      const close = (): void => {
        vm.close();
        memory.close();
      };
      return { vm, memory, close };
    };

    t.test('memslots are writable and not logged, and stay where they are once it has run', (t) => {
      const { vm, memory, close } = begin();
      const more = { address: 4 * MiB, size: P, hostMemory: memory };
      refused(t, () => vm.createMemslot({ ...more, readonly: true }), 'EPERM');
      refused(t, () => vm.createMemslot({ ...more, logDirtyPages: true }), 'EPERM');
      const slot = vm.createMemslot({ ...more, hostOffset: 2 * MiB - P });
      slot.move(8 * MiB);
      GuestAgent.boot(vm, { address: HOME });
      refused(t, () => slot.move(4 * MiB), 'EPERM', 'has run');
      refused(t, () => slot.remove(), 'EPERM', 'has run');
      vm.createMemslot({ ...more, hostOffset: 0 });
      close();
      t.end();
    });

    t.test('what the guest touches is its own, and the agent brings it out', (t) => {
      const { vm, memory } = begin();
      vm.memory.write(0, Buffer.from('from the host'));
      const agent = GuestAgent.boot(vm, { address: HOME });
      t.equal(agent.address, HOME);
      t.equal(Buffer.from(agent.read(0, 13)).toString(), 'from the host');
      agent.write(4, Buffer.from('for the guest'));
      t.equal(Buffer.from(agent.read(0, 17)).toString(), 'fromfor the guest');
      const error = refused(t, () => vm.memory.read(2, 4), 'EFAULT', 'guest has the page');
      t.equal(error.errorOffset, 2);
      refused(t, () => vm.memory.write(2, new Uint8Array(1)), 'EFAULT', 'guest has the page');
      t.equal(Buffer.from(agent.read(0, 17)).toString(), 'fromfor the guest', 'nothing of that reached it');
      t.same(vm.memory.read(P, 4), new Uint8Array(4), 'a page that it never touched is the host’s');
      agent.fill({ address: P, size: 3 * P }, 7);
      t.equal(agent.checksum({ address: P, size: 8 }), 0x0707070707070707n);
      t.equal(agent.compareAndSwap(2 * P, 0x0707070707070707n, 1n), 0x0707070707070707n);
      t.same(agent.read(2 * P, 8), Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
      vm.close();
      t.same(readLater(kvm, memory, 4 * P), new Uint8Array(4 * P), 'and nobody sees it when the VM is gone');
      memory.close();
      t.end();
    });

    t.test('a guest_memfd beside host memory is nobody’s', (t) => {
      const { vm, close } = begin();
      const guestMemfd = vm.createGuestMemfd({ size: P, mmap: true, initShared: true });
      const other = kvm.createHostMemory({ size: P });
      vm.createMemslot({ address: 4 * MiB, size: P, hostMemory: other, guestMemfd });
      vm.memory.write(4 * MiB, Buffer.from('host memory'));
      const agent = GuestAgent.boot(vm, { address: HOME });
      t.equal(Buffer.from(agent.read(4 * MiB, 11)).toString(), 'host memory');
      t.equal(guestMemfd.residentBytes(), 0);
      close();
      other.close();
      t.end();
    });

    t.test('it shares pages, and takes them back', (t) => {
      const { vm, close } = begin();
      const agent = GuestAgent.boot(vm, { address: HOME });
      agent.write(2 * P, Buffer.from('to be seen'));
      t.equal(agent.hypercall(MEM_SHARE, [BigInt(2 * P)]), 0n);
      t.equal(Buffer.from(vm.memory.read(2 * P, 10)).toString(), 'to be seen');
      vm.memory.write(2 * P, Buffer.from('as the host says'));
      t.equal(Buffer.from(agent.read(2 * P, 16)).toString(), 'as the host says');
      t.equal(agent.hypercall(MEM_UNSHARE, [BigInt(2 * P)]), 0n);
      refused(t, () => vm.memory.read(2 * P, 1), 'EFAULT');
      t.equal(Buffer.from(agent.read(2 * P, 16)).toString(), 'as the host says');
      t.equal(agent.hypercall(MEM_UNSHARE, [BigInt(2 * P)]), -3n);
      // Where no memory is, the guest takes an exception, and goes on.
      refused(t, () => agent.hypercall(MEM_SHARE, [BigInt(512 * MiB)]), 'EFAULT', 'ESR_EL1 0x96000010');
      t.equal(agent.read(2 * P, 1).length, 1);
      close();
      t.end();
    });

    t.test('there are no views of its memory: they would end the process', (t) => {
      const memory = kvm.createHostMemory({ size: MiB });
      const view = memory.bytes();
      const vm = kvm.createVm({ type: 'protected' });
      refused(t, () => vm.createMemslot({ address: 0, size: MiB, hostMemory: memory, readonly: true }), 'EPERM');
      t.equal(view.length, MiB, 'a refused memslot changes nothing');
      const slot = vm.createMemslot({ address: 0, size: MiB, hostMemory: memory });
      t.equal(view.length, 0);
      refused(t, () => memory.bytes(), 'EBUSY', 'protected');
      refused(t, () => vm.memory.view(0, P), 'EBUSY', 'protected');
      slot.remove();
      refused(t, () => memory.bytes(), 'EBUSY', 'protected');
      vm.close();
      memory.close();
      t.end();
    });

    t.test('an agent whose mailbox the host took away says so', (t) => {
      const { vm, memory, close } = begin();
      const agent = GuestAgent.boot(vm, { address: HOME });
      memory.discard({ offset: HOME, size: MiB });
      refused(t, () => agent.read(0, 1), 'EIO', 'mailbox');
      close();
      t.end();
    });

    t.test('a snapshot would need what the guest has', (t) => {
      const { vm, close } = begin();
      const store = kvm.openStore(t.testdir());
      refused(t, () => store.snapshot(vm, 'one'), 'UNSUPPORTED', 'protected');
      store.close();
      close();
      t.end();
    });

    t.test('two vCPUs see one memory', (t) => {
      const { vm, close } = begin();
      const vcpus = [vm.createVcpu(), vm.createVcpu()];
      const [one, other] = vcpus.map((vcpu, index) =>
        GuestAgent.boot(vm, { vcpu, address: HOME + index * 0.25 * MiB }),
      ) as [GuestAgent, GuestAgent];
      one.write(3 * P, Uint8Array.of(1, 2, 3));
      t.same(other.read(3 * P, 3), Uint8Array.of(1, 2, 3));
      close();
      t.end();
    });

    await t.test('every file is closed', (t) => {
      kvm.close();
      t.same(openFiles(), before);
      t.end();
    });
  });
}

/** What the host finds in memory that nobody else has any more: through a VM of another kind, for it is in no view. */
function readLater(kvm: Kvm, memory: HostMemory, length: number): Uint8Array {
  using vm = kvm.createVm();
  vm.createMemslot({ address: 0, size: memory.size, hostMemory: memory });
  return vm.memory.read(0, length);
}
