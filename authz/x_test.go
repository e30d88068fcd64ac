package authz
import ("testing";"fmt";"time";"os";"runtime")
func TestX(t *testing.T){
 dir:=world(t)
 for i:=range 100000 { os.WriteFile(fmt.Sprintf("%s/grants/u%d.json",dir,i), []byte(grantText("T-1","debug",time.Hour)),0o644) }
 b:=time.Now(); e:=open(t,Config{Data:dir}); t.Log("open",time.Since(b))
 var m runtime.MemStats; runtime.GC(); runtime.ReadMemStats(&m); t.Log("heap MiB",m.HeapAlloc>>20)
 time.Sleep(5*time.Second)
 b=time.Now(); e.data.scan(nil,time.Now()); t.Log("scan (racy w/ goroutine)",time.Since(b))
 for range 5 {
 time.Sleep(3*time.Second)
 tk:=fmt.Sprint("T-",time.Now().UnixNano()); put(t,dir,"grants/alice.json",grantText(tk,"debug",time.Hour)); b=time.Now()
 for login(t,e).Ticket!=tk { time.Sleep(10*time.Millisecond)}; t.Log("edit",time.Since(b))
 }
}
