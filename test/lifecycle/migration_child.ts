import net from 'node:net';
import { GuestAgent, Kvm, MiB, sendMemory, servePages } from '../../lib/index.ts';

// The source of a post-copy migration: sends a VM to a socket, and answers for its pages at another.

const [backend = 'software', path = '', pagesPath = '', how = ''] = process.argv.slice(2) as [
  'kvm' | 'software',
  ...string[],
];
const kvm = Kvm.open({ backend });
const vm = kvm.createVm();
vm.createMemslot({ address: 0, size: 4 * MiB, hostMemory: kvm.createHostMemory({ size: 4 * MiB, kind: 'memfd' }) });
for (let at = MiB; at < 4 * MiB; at += kvm.pageSize) vm.memory.write(at, Buffer.from(`page ${at}`));
const agent = GuestAgent.boot(vm, { address: 0 });
agent.write(2 * MiB, Buffer.from('the guest was here'));

const server = net.createServer(async (stream) => {
  if (how === 'dies') {
    await moved;
    process.exit(3);
  }
  await servePages(vm, stream);
  stream.end();
  server.close();
});
server.listen(pagesPath);
const stream = net.connect(path);
const moved = sendMemory(vm, stream, {
  postCopy: true,
  rounds: how === 'hybrid' ? 2 : 0,
  prepare: () => {
    agent.write(3 * MiB, Buffer.from('last words'));
    agent.close();
    return Buffer.from('registers');
  },
});
const report = await moved;
stream.end();
console.log(JSON.stringify(report));
