import { GuestAgent, handOver, Kvm, MiB, takeFromSystemd, takeOver } from '../../lib/index.ts';
import { ERRNO, SOCK_SEQPACKET } from '../../lib/uapi.ts';

// One side of a hand-over, on KVM, in a process of its own.

const [part = '', path = ''] = process.argv.slice(2);
const ADDRESS = 4 * MiB;
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

switch (part) {
  case 'predecessor': {
    const kvm = Kvm.open({ backend: 'kvm' });
    const vm = kvm.createVm();
    vm.createMemslot({ address: 0, size: 8 * MiB, hostMemory: kvm.createHostMemory({ size: 8 * MiB, kind: 'memfd' }) });
    GuestAgent.boot(vm, { address: 0 }).write(ADDRESS, Buffer.from('from a guest of another process'));
    const { bytes } = await handOver(vm, { path, prepare: () => Buffer.from(`${process.pid}`) });
    console.log(bytes);
    break;
  }
  case 'successor': {
    const kvm = Kvm.open({ backend: 'kvm' });
    const { vm } = await takeOver(kvm, { path });
    console.log(text(GuestAgent.boot(vm, { address: 0 }).read(ADDRESS, 9)));
    break;
  }
  case 'dies': {
    const { kernel } = Kvm.open({ backend: 'kvm' }).backing;
    const socket = kernel.socket(SOCK_SEQPACKET);
    kernel.connect(socket, path);
    const got: number[] = [];
    while (kernel.recvmsg(socket, new Uint8Array(64), got) === -ERRNO.EAGAIN);
    process.kill(process.pid, 'SIGKILL');
    break;
  }
  case 'restarted': {
    process.env.LISTEN_PID = `${process.pid}`;
    process.env.LISTEN_FDS = '3';
    process.env.LISTEN_FDNAMES = 'other:vm.1:vm.0';
    const kvm = Kvm.open({ backend: 'kvm' });
    const { vm, data } = takeFromSystemd(kvm, { name: 'vm' });
    console.log(`${text(data)}: ${text(GuestAgent.boot(vm, { address: 0 }).read(ADDRESS, 9))}`);
    break;
  }
}
