import { type MessagePort, workerData } from 'node:worker_threads';
import { type Answer, plainError, VcpuDriver, type VcpuPlan } from './vcpu_driver.ts';
import { Vm, type VmHandle } from './vm.ts';

/** What VcpuWorker posts here: the answer to the last exit, or nothing when it is time to go. */
type ToThread = Answer | null;

const { handle, plan, port } = workerData as { handle: VmHandle; plan: VcpuPlan; port: MessagePort };
const vm = Vm.attach(handle);

function run(driver: VcpuDriver, answer: Answer): void {
  try {
    port.postMessage({ exit: driver.next(answer) });
  } catch (error) {
    port.postMessage({ error: plainError(error) });
  }
}

try {
  const driver = await VcpuDriver.start(vm, plan);
  const { vcpu } = driver;
  port.on('message', (answer: ToThread) => {
    if (answer !== null) return run(driver, answer);
    vm.close();
    port.close();
  });
  port.postMessage({ id: vcpu.id, fd: vcpu.handle.fd });
} catch (error) {
  port.postMessage({ error: plainError(error) });
  vm.close();
  port.close();
}
