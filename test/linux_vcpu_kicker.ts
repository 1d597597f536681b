import { parentPort, workerData } from 'node:worker_threads';
import { linuxKernel } from '../lib/kernel/linux/linux_kernel.ts';

// Kicks a vCPU of another thread. shared: [kicks asked for, kicks done + 1, end].
const { vcpu, shared, mode } = workerData as { vcpu: number; shared: Int32Array; mode: 'storm' | 'one by one' };
const kernel = linuxKernel();
Atomics.store(shared, 1, 1);
parentPort?.postMessage('ready');
for (let done = 0; ; done++) {
  if (mode === 'one by one') {
    Atomics.wait(shared, 0, done);
    // Sometimes before the run begins, sometimes long after.
    for (let pause = (done * 7919) % 20_000; pause > 0; pause--);
  }
  if (Atomics.load(shared, 2) === 1) break;
  if (kernel.kick(vcpu) !== 0) throw new Error('the kick failed');
  Atomics.store(shared, 1, done + 2);
}
